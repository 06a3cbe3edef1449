// Two settings of one picture, with the same seed: the choice of what differs.
import { $, show } from "./dom.js";
import { copyControl, readSettings } from "./form.js";
import { fallback } from "./offer.js";
import { newSeed } from "./seed.js";

const VARIED = {
  cache: ["Cache", "off", "balanced"],
  num_inference_steps: ["Steps"],
  guidance_scale: ["Guidance"],
  sampler: ["Sampler", "euler", "dpm"],
  preset: ["Preset", "", "official"],
  system_prompt: ["Template", "real", "base"],
};

const half = (value) => Math.max(1, Math.round(value / 2));

/** What A and B begin with. */
function beginning(name) {
  const [, a, b] = VARIED[name];
  if (a !== undefined) return [a, b];
  const now = Number($(name).value || fallback(name, $("preset").value) || 1);
  return name === "guidance_scale" ? [1, now] : [now, half(now)];
}

function offerValues() {
  const name = $("vary").value;
  const [a, b] = beginning(name);
  $("variant-a").replaceChildren(...copyControl(name, "A", a));
  $("variant-b").replaceChildren(...copyControl(name, "B", b));
}

export function wireCompare() {
  $("vary").replaceChildren(...Object.entries(VARIED).map(([name, [label]]) => new Option(label, name)));
  $("vary").addEventListener("change", offerValues);
}

/** Shows or hides the choice. */
export function setComparing(on) {
  show($("variants"), on);
  if (on && !$("variant-a").children.length) offerValues();
}

/** The two bodies, of one seed, with a label for each: what it has that the other has not. */
export function readVariants() {
  const name = $("vary").value;
  const base = readSettings();
  base.seed ??= newSeed();
  delete base.num_images;
  if (name === "system_prompt") delete base.panel;
  return ["a", "b"].map((letter) => {
    const control = $(`${letter}-value`);
    const body = { ...base };
    delete body[name];
    if (control.value !== "") {
      body[name] = control.type === "number" ? Number(control.value) : control.value;
    }
    const shown = control.value || fallback(name, body.preset) || "default";
    return { letter: letter.toUpperCase(), body, label: `${VARIED[name][0].toLowerCase()} ${shown}` };
  });
}
