// Bundles viewer.js with three.js into ../static/viewer.js, whose first line names what it was made of.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { build } from "esbuild";

const digest = createHash("sha256");
for (const name of ["viewer.js", "build.js", "package-lock.json"]) digest.update(readFileSync(name));

await build({
  entryPoints: ["viewer.js"],
  outfile: "../static/viewer.js",
  banner: { js: `// SHA-256 of viewer.js, build.js and package-lock.json: ${digest.digest("hex")}` },
  bundle: true,
  minify: true,
  format: "esm",
  legalComments: "inline",
  charset: "utf8",
});
