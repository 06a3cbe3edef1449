// A finished job: its pictures, where the time went, and what to do with them.
import { $, el, seconds, show } from "./dom.js";
import { fileName, picture } from "./picture.js";

const STAGES = ["queue", "encode", "denoise", "decode", "store"];

export function showWarnings(warnings) {
  $("warnings").replaceChildren(...warnings.map((text) => el("li", { textContent: text })));
  show($("warnings"), warnings.length > 0);
}

/** Shows an entry of the history; `actions` are what its buttons do. */
export function showResult(entry, actions) {
  const { body, images } = entry;
  const format = body.output_format;
  const figures = images.map((image, index) => {
    const thumb = index === 0 ? entry.thumb : null;
    const node = picture(image, { prompt: body.prompt, thumb });
    if (images.length === 1) return el("figure", {}, node);
    const link = el("a", {
      href: image.url, download: fileName(image, format), textContent: "Download",
      attrs: { "aria-label": `Download picture ${index + 1}` },
    });
    return el("figure", {}, node, el("figcaption", {}, el("span", { textContent: `seed ${image.seed}` }), link));
  });
  const pictures = el("div", { className: images.length === 1 ? "pictures one" : "pictures" }, ...figures);
  $("frame").replaceChildren(pictures);
  showWarnings(entry.warnings ?? []);
  $("report").replaceChildren(tools(entry, actions), ...timeBar(entry.timings), facts(entry));
}

function tools(entry, { onKeepSeed, onCode }) {
  const image = entry.images[0];
  const box = el("div", { className: "tools" });
  if (entry.images.length === 1) {
    box.append(el("a", {
      className: "button", href: image.url, download: fileName(image, entry.body.output_format), textContent: "Download",
    }));
  }
  box.append(el("a", {
    className: "button", href: image.url, target: "_blank", rel: "noopener", textContent: "Open",
    attrs: { "aria-label": "Open the picture in a new tab" },
  }));
  const seed = el("button", { type: "button", className: "quiet", textContent: "Keep this seed" });
  seed.addEventListener("click", () => onKeepSeed(image.seed));
  const code = el("button", { type: "button", className: "quiet", textContent: "Use in code" });
  code.addEventListener("click", () => onCode(entry));
  box.append(seed, code);
  return box;
}

function timeBar(timings) {
  if (!timings) return [];
  const shown = STAGES.filter((stage) => timings[`${stage}_s`] > 0);
  const bar = el("div", { className: "spent", attrs: { "aria-hidden": "true" } });
  const legend = el("p", { className: "legend" });
  for (const stage of shown) {
    const part = el("i", { data: { stage } });
    part.style.flexGrow = timings[`${stage}_s`];
    bar.append(part);
    legend.append(el("span", {}, el("i", { data: { stage } }), `${stage} ${seconds(timings[`${stage}_s`])}`));
  }
  return [el("div", {}, bar), legend];
}

/** "30 computed" or "18 computed, 12 skipped". */
export const stepsText = ({ computed, skipped }) =>
  skipped ? `${computed} computed, ${skipped} skipped` : `${computed} computed`;

function facts(entry) {
  const { images, steps, timings } = entry;
  const rows = [
    ["seed", images.length > 1 ? `${images[0].seed} to ${images.at(-1).seed}` : images[0].seed],
    ["size", `${images[0].width} × ${images[0].height}`],
    ["steps", steps ? stepsText(steps) : null],
    ["evaluations", steps?.nfe || null],
    ["prompt", entry.prompt_tokens ? `${entry.prompt_tokens} tokens` : null],
    ["total", timings ? seconds(timings.total_s) : null],
    ["model", entry.model],
    ["job", entry.id],
  ];
  const list = el("dl", { className: "facts tiles" });
  for (const [name, value] of rows) {
    if (value === undefined || value === null) continue;
    list.append(el("div", {}, el("dt", { textContent: name }), el("dd", { textContent: value })));
  }
  return list;
}
