// What the served model offers: limits, defaults, presets, templates, LoRAs.
import { sleep } from "./dom.js";
import { getJson } from "./http.js";

const FALLBACKS = { guidance_scale: 4, sampler: "euler", cache: "off", system_prompt: "real" };

let offer = null;

/** Asks until a worker has published its model. The service's state says meanwhile what is amiss. */
export async function learnOffer() {
  for (;;) {
    try {
      offer = await getJson("/presets");
      return offer;
    } catch (error) {
      await sleep(error.status === 401 ? 3000 : 1000);
    }
  }
}

/** What a request uses for a setting that its body leaves out. */
export function fallback(name, preset) {
  return offer?.presets[preset]?.[name] ?? offer?.defaults[name] ?? FALLBACKS[name] ?? null;
}
