// Two finished jobs side by side, under a slider, or as their difference; with their figures.
import { $, choose, chosen, el, seconds } from "./dom.js";
import { difference } from "./difference.js";
import { picture } from "./picture.js";
import { showWarnings, stepsText } from "./result.js";

const VIEWS = [["side", "Side by side"], ["slider", "Slider"], ["difference", "Difference"]];
const GAIN = 4;

/** Shows two entries of the history, `labels` saying what differs. */
export async function showComparison(entries, labels, onCode) {
  const urls = entries.map((entry) => entry.images[0].url);
  const apart = await difference(...urls, GAIN).catch(() => null);
  const view = el("div", { className: "switch", attrs: { role: "radiogroup", "aria-label": "View" } });
  for (const [value, text] of VIEWS) {
    if (value !== "side" && !apart) continue;
    view.append(el("label", {}, el("input", { type: "radio", name: "view", value }), text));
  }
  choose(view, "side");
  const draw = () => $("frame").replaceChildren(views[chosen(view)](entries, labels, apart));
  view.addEventListener("change", draw);
  draw();
  showWarnings(entries.flatMap((entry) => entry.warnings ?? []));
  $("report").replaceChildren(view, table(entries, labels, apart), tools(entries, onCode));
}

const views = { side: sideBySide, slider, difference: heat };

function caption(index, label) {
  return [el("span", { className: "badge", textContent: "AB"[index], attrs: { "aria-hidden": "true" } }), label];
}

function sideBySide(entries, labels) {
  return el("div", { className: "compared" }, ...entries.map((entry, index) => {
    const image = picture(entry.images[0], { prompt: `${entry.body.prompt}, ${labels[index]}`, thumb: entry.thumb });
    return el("figure", {}, image, el("figcaption", {}, ...caption(index, labels[index])));
  }));
}

function slider(entries, labels) {
  const [under, over] = entries.map((entry, index) =>
    picture(entry.images[0], { prompt: `${entry.body.prompt}, ${labels[index]}`, thumb: entry.thumb }));
  over.classList.add("over");
  const box = el("div", {}, under, over, el("div", { className: "edge", attrs: { "aria-hidden": "true" } }));
  box.className = "overlay";
  const range = el("input", {
    type: "range", min: 0, max: 100, value: 50, attrs: { "aria-label": `Left: A, ${labels[0]}. Right: B, ${labels[1]}` },
  });
  range.addEventListener("input", () => box.style.setProperty("--cut", `${range.value}%`));
  return el("div", { className: "overlay" }, box, range);
}

function heat(entries, labels, apart) {
  const text = `Difference of the two pictures, ${GAIN} times enlarged`;
  apart.canvas.setAttribute("role", "img");
  apart.canvas.setAttribute("aria-label", text);
  return el("figure", { className: "heat" }, apart.canvas, el("figcaption", { className: "muted", textContent: `${text}.` }));
}

function table(entries, labels, apart) {
  const times = entries.map((entry) => entry.timings ?? {});
  const row = (name, cells, last = "") =>
    el("tr", {}, el("th", { textContent: name, scope: "row" }),
      ...cells.map((cell) => el("td", { textContent: cell })), el("td", { textContent: last }));
  const faster = (name) => {
    const [a, b] = times.map((time) => time[name]);
    return a > 0.0005 && b > 0.0005 ? `${(a / b).toFixed(2)}×` : "";
  };
  const rows = ["denoise", "decode", "total"].map((stage) =>
    row(stage, times.map((time) => seconds(time[`${stage}_s`] ?? 0)), faster(`${stage}_s`)));
  const steps = entries.map((entry) => (entry.steps ? stepsText(entry.steps) : ""));
  const nfe = entries.map((entry) => entry.steps?.nfe ?? "");
  return el("table", { className: "table" },
    el("caption", { className: "visually-hidden", textContent: "Figures of both pictures" }),
    el("thead", {}, el("tr", {}, el("th", { textContent: apart ? likeness(apart) : "", scope: "col" }),
      ...labels.map((label, index) => el("th", { scope: "col" }, ...caption(index, label))),
      el("th", { textContent: "A / B", scope: "col" }))),
    el("tbody", {}, ...rows, row("steps", steps), row("evaluations", nfe)));
}

function likeness({ psnr, largest, mean }) {
  if (psnr === Infinity) return "Equal in every pixel";
  return `PSNR ${psnr.toFixed(1)} dB · mean ${mean.toFixed(2)}, at most ${largest} of 255`;
}

function tools(entries, onCode) {
  const box = el("div", { className: "tools" });
  for (const [index, entry] of entries.entries()) {
    const button = el("button", { type: "button", className: "quiet", textContent: `${"AB"[index]} in code` });
    button.addEventListener("click", () => onCode(entry));
    box.append(button);
  }
  return box;
}
