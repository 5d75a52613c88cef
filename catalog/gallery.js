"use strict";
const find = (id) => document.getElementById(id);
const list = find("cards"), cards = [...list.children], fields = ["kind", "color", "state"];
const plain = (text) => text.normalize("NFKD").replace(/\p{M}/gu, "").toLowerCase();
const texts = new Map(cards.map((card) => [card, plain(card.dataset.text)]));

for (const name of ["kind", "color"]) {
  const counts = new Map();
  for (const card of cards) if (card.dataset[name]) counts.set(card.dataset[name], 1 + (counts.get(card.dataset[name]) || 0));
  for (const [value, count] of [...counts].sort((a, b) => b[1] - a[1] || a[0].localeCompare(b[0])))
    find(name).append(new Option(`${value} (${count})`, value));
}

function choose() {
  const words = plain(find("search").value).split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const card of cards) {
    const fits = words.every((word) => texts.get(card).includes(word)) &&
      fields.every((name) => !find(name).value || card.dataset[name] === find(name).value);
    card.hidden = !fits;
    shown += fits;
  }
  find("count").textContent = shown === cards.length ? `${shown} objects` : `${shown} of ${cards.length} objects`;
  find("nothing").hidden = shown > 0;
}

const byName = (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true });
const sureness = (card) => card.dataset.confidence === "" ? 2 : Number(card.dataset.confidence);
const orders = {
  name: byName,
  kind: (a, b) => a.dataset.kind.localeCompare(b.dataset.kind) || byName(a, b),
  unsure: (a, b) => sureness(a) - sureness(b),
};

find("search").addEventListener("input", choose);
for (const name of fields) find(name).addEventListener("change", choose);
find("order").addEventListener("change", () => list.append(...(orders[find("order").value] ? [...cards].sort(orders[find("order").value]) : cards)));
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== find("search")) { event.preventDefault(); find("search").focus(); }
});
choose();
