// Small helpers for the document. Text always goes in as text, never as markup.

export const $ = (id) => document.getElementById(id);

/** A new element with properties, data attributes, attributes and children. */
export function el(tag, { data = {}, attrs = {}, ...props } = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  Object.assign(node.dataset, data);
  for (const [name, value] of Object.entries(attrs)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

export function show(node, visible) {
  node.hidden = !visible;
}

/** The chosen value of a group of radio buttons, and choosing one. */
export function chosen(group) {
  return group.querySelector("input:checked")?.value ?? "";
}

export function choose(group, value) {
  const input = [...group.querySelectorAll("input")].find((item) => item.value === value);
  if (input) input.checked = true;
}

export const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Seconds in words that fit their size. */
export function seconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(2)} s`;
  if (value < 99.5) return `${value.toFixed(1)} s`;
  return `${Math.round(value / 60)} min`;
}

/** An estimate, which is no better than whole seconds. */
export const roughly = (value) => (value < 90 ? `${Math.max(1, Math.round(value))} s` : seconds(value));

/** "1 job", "2 jobs". */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// Dialogs close by their own buttons, and by a click beside them.
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}
