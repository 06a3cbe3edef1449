// LoRAs on offer: a tick and a scale for each.
import { $, el, show } from "./dom.js";

const rows = new Map();

export function offerLoras(names) {
  rows.clear();
  for (const name of names) {
    const tick = el("input", { type: "checkbox" });
    const scale = el("input", {
      type: "number", step: 0.1, value: 1, inputMode: "decimal", attrs: { "aria-label": `Scale of ${name}` },
    });
    rows.set(name, { tick, scale });
  }
  $("loras").replaceChildren(
    ...[...rows].map(([name, { tick, scale }]) =>
      el("div", { className: "lora" }, el("label", {}, tick, name), scale)),
  );
  show($("loras-field"), names.length > 0);
}

export function loraValues() {
  return [...rows]
    .filter(([, { tick }]) => tick.checked)
    .map(([name, { scale }]) => ({ name, scale: Number(scale.value || 1) }));
}

export function setLoras(loras) {
  for (const [name, { tick, scale }] of rows) {
    const found = loras.find((lora) => lora.name === name);
    tick.checked = Boolean(found);
    scale.value = found?.scale ?? 1;
  }
}
