// The 3D view of the demo page: the cloud in its colors, as a heat map, or the surface that it was sampled from.
// `npm run build` bundles this file with three.js into ../static/viewer.js, which the page loads; no network is needed.

import {
  Box3, BufferAttribute, BufferGeometry, CanvasTexture, Color, DoubleSide, GridHelper, Group, HemisphereLight, PerspectiveCamera,
  Points, PointsMaterial, Scene, Sphere, Spherical, SRGBColorSpace, Vector3, WebGLRenderer,
} from "three";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";

const POINT_SIZE = 1; // over the square root of the number of points, for an object of radius 1
const FIRST_DIRECTION = new Vector3(1, 0.6, 1.3);
const TURN = Math.PI / 24; // for each press of an arrow key
const ZOOM = 1.15; // for each press of + or -
// From "this axis points up" to "y points up".
const UP_ROTATIONS = { x: [0, 0, Math.PI / 2], y: [0, 0, 0], z: [-Math.PI / 2, 0, 0] };

/** The bytes of a base64 text. */
function decode(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** RGB bytes of points → linear colors, as three.js computes with. */
function toLinear(bytes) {
  const color = new Color();
  const linear = new Float32Array(bytes.length);
  for (let i = 0; i < bytes.length; i += 3) {
    color.setRGB(bytes[i] / 255, bytes[i + 1] / 255, bytes[i + 2] / 255, SRGBColorSpace).toArray(linear, i);
  }
  return linear;
}

/** A disk with a darker rim, so that points of one color can be told apart. */
function drawPoint() {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const context = canvas.getContext("2d");
  for (const [radius, gray] of [[32, "#b0b0b0"], [25, "#ffffff"]]) {
    context.fillStyle = gray;
    context.beginPath();
    context.arc(32, 32, radius, 0, 2 * Math.PI);
    context.fill();
  }
  const texture = new CanvasTexture(canvas);
  texture.colorSpace = SRGBColorSpace;
  return texture;
}

class Viewer {
  /** @param {HTMLElement} host - is filled by the canvas; its size may change. */
  constructor(host) {
    this.host = host;
    this.renderer = new WebGLRenderer({ alpha: true, antialias: true });
    this.canvas = this.renderer.domElement;
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "application"); // screen readers leave the arrow keys to it
    this.problem = document.createElement("p");
    this.problem.className = "problem";
    this.problem.setAttribute("role", "alert");
    host.append(this.canvas, this.problem);
    this.camera = new PerspectiveCamera(35, 1, 0.01, 100);
    this.controls = new OrbitControls(this.camera, this.canvas);
    this.controls.enableDamping = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.controls.minDistance = 0.5;
    this.controls.maxDistance = 20;
    this.controls.addEventListener("change", () => this.requestFrame());
    this.scene = new Scene();
    this.scene.add(new HemisphereLight(0xffffff, 0x8c8c8c, Math.PI));
    this.grid = new GridHelper(2, 10, 0x808080, 0x808080);
    Object.assign(this.grid.material, { transparent: true, opacity: 0.35 });
    this.scene.add(this.grid);
    this.point = drawPoint();
    this.shown = {};
    this.canvas.addEventListener("keydown", (event) => this.onKey(event));
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(host);
    this.resetCamera();
  }

  resize() {
    const { clientWidth: width, clientHeight: height } = this.host;
    if (!width || !height) return;
    this.renderer.setPixelRatio(devicePixelRatio);
    this.renderer.setSize(width, height);
    this.camera.aspect = width / height;
    this.camera.updateProjectionMatrix();
    this.requestFrame();
  }

  /** Draw before the next repaint; nothing is drawn as long as nothing changes. */
  requestFrame() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.controls.update();
      this.renderer.render(this.scene, this.camera);
    });
  }

  /** End what is left of a movement by the mouse. */
  rest() {
    const { enableDamping } = this.controls;
    this.controls.enableDamping = false;
    this.controls.update();
    this.controls.enableDamping = enableDamping;
  }

  resetCamera() {
    this.rest();
    const half = Math.tan((this.camera.fov * Math.PI) / 360) * Math.min(1, this.camera.aspect);
    this.controls.target.set(0, 0, 0);
    this.camera.position.copy(FIRST_DIRECTION).setLength(0.95 / Math.sin(Math.atan(half)));
    this.requestFrame();
  }

  onKey(event) {
    const turns = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const zooms = { "+": 1 / ZOOM, "=": 1 / ZOOM, "-": ZOOM };
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    this.rest();
    const place = new Spherical().setFromVector3(this.camera.position.clone().sub(this.controls.target));
    if (event.key in turns) {
      place.theta += TURN * turns[event.key][0];
      place.phi += TURN * turns[event.key][1];
    } else if (event.key in zooms) {
      place.radius *= zooms[event.key];
    } else if (event.key === "Home") {
      event.preventDefault();
      return this.resetCamera();
    } else return;
    event.preventDefault();
    this.camera.position.setFromSpherical(place.makeSafe()).add(this.controls.target);
    this.requestFrame();
  }

  /**
   * Show an object, or another view of the one that is shown, from where the camera is.
   *
   * @param {object|null} object - `id`, another one for another object; `name`; `coord`, base64 of float32 (N, 3); `color`, base64 of uint8 (N, 3); `surface`, URL of a
   *   GLB or null; `up`, axis that points up in it; `view`, "cloud", "surface" or "heat"; `heat`, base64 of uint8 (N, 3) or null.
   */
  async show(object) {
    const before = this.shown;
    this.shown = object ?? {};
    this.canvas.setAttribute("aria-label", object ? `${object.name} in 3D. Arrow keys turn it, + and - zoom, Home resets.` : "empty");
    if (before.id !== this.shown.id) this.resetCamera();
    let content = null;
    let problem = "";
    if (object?.view === "surface") {
      this.host.dataset.state = "loading";
      try {
        content = await this.loadSurface(object);
      } catch (error) {
        console.error(error);
        problem = "The surface cannot be loaded. This is the cloud.";
      }
      if (this.shown !== object) return this.dispose(content); // something else was asked for meanwhile
    }
    if (object) content ??= this.makePoints(object);
    this.dispose(this.content);
    this.content = content;
    this.grid.visible = content !== null;
    if (content) this.fit(content);
    this.problem.textContent = problem;
    this.host.dataset.state = problem ? "failed" : (object?.view ?? "empty");
    this.requestFrame();
  }

  /** Remove content from the scene, and what it occupies on the graphics card. */
  dispose(content) {
    if (!content) return;
    this.scene.remove(content);
    content.traverse((part) => {
      part.geometry?.dispose();
      for (const material of [part.material ?? []].flat()) {
        for (const value of Object.values(material)) {
          if (value?.isTexture && value !== this.point) value.dispose();
        }
        material.dispose();
      }
    });
  }

  makePoints(object) {
    const geometry = new BufferGeometry();
    geometry.setAttribute("position", new BufferAttribute(new Float32Array(decode(object.coord).buffer), 3));
    const colors = decode(object.view === "heat" ? object.heat : object.color);
    geometry.setAttribute("color", new BufferAttribute(toLinear(colors), 3));
    const zoom = 1 / Math.tan((this.camera.fov * Math.PI) / 360); // which three.js leaves out of the size of points
    const size = (POINT_SIZE * zoom) / Math.sqrt(colors.length / 3);
    const material = new PointsMaterial({ size, vertexColors: true, map: this.point, alphaTest: 0.5 });
    return new Group().add(new Points(geometry, material));
  }

  async loadSurface(object) {
    const { scene } = await new GLTFLoader().loadAsync(object.surface);
    scene.traverse((part) => {
      if (part.material) Object.assign(part.material, { side: DoubleSide, metalness: 0, roughness: 1 });
    });
    scene.rotation.set(...UP_ROTATIONS[object.up ?? "y"]);
    return new Group().add(scene);
  }

  /** Center the object, scale it to radius 1, and put the grid below it. */
  fit(content) {
    const box = new Box3().setFromObject(content);
    const { center, radius } = box.getBoundingSphere(new Sphere());
    content.scale.setScalar(1 / radius);
    content.position.copy(center).multiplyScalar(-1 / radius);
    this.grid.position.y = (box.min.y - center.y) / radius - 0.001;
    this.scene.add(content);
  }
}

/**
 * Put a viewer into an element. Returns a function that shows an object, see `Viewer.show`.
 */
export function mount(host) {
  let viewer;
  try {
    viewer = new Viewer(host);
  } catch {
    host.dataset.state = "failed";
    host.textContent = "This browser does not show 3D (WebGL is missing or switched off). Questions are answered all the same.";
    return () => {};
  }
  return (object) =>
    viewer.show(object).catch((error) => {
      host.dataset.state = "failed";
      console.error(error);
    });
}
