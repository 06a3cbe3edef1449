// Prompts to begin with, in the languages that models of this family read.
import { $, el } from "./dom.js";

const EXAMPLES = [
  ["en", "English", ["a red circle above a blue square", "three yellow stars", "a purple diamond"]],
  ["de", "Deutsch", ["ein roter Kreis über einem blauen Quadrat", "drei gelbe Sterne"]],
  ["zh", "中文", ["一个红色圆形在一个蓝色正方形上面", "三颗黄色的星星"]],
  ["ja", "日本語", ["青い正方形の上に赤い円", "三つの黄色い星"]],
  ["ru", "Русский", ["красный круг над синим квадратом", "три жёлтые звезды"]],
];

/** A button for each language; each click puts its next example in the prompt. */
export function addExamples(onChoose) {
  for (const [lang, language, texts] of EXAMPLES) {
    const button = el("button", {
      type: "button", textContent: language, title: texts.join("\n"), lang,
      attrs: { "aria-label": `Example in ${language}` },
    });
    let next = 0;
    button.addEventListener("click", () => onChoose(texts[next++ % texts.length]));
    $("examples").append(button);
  }
}
