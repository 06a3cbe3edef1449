// Programs that repeat a request exactly: a shell command and a Python script.

/** `text` as one word of a POSIX shell. */
export const shellWord = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** A value of JSON as a Python literal. */
export function pythonLiteral(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}    `;
  const items = Array.isArray(value)
    ? value.map((item) => pythonLiteral(item, deeper))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${pythonLiteral(item, deeper)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  if (!items.length) return open + close;
  return `${open}\n${items.map((item) => `${deeper}${item},\n`).join("")}${indent}${close}`;
}

const extension = (body) => ({ jpeg: "jpg", webp: "webp" })[body.output_format] ?? "png";
const single = (body) => (body.num_images ?? 1) === 1;

/** A curl command; with several images it prints the job, whose pictures have addresses. */
export function curl(body, { origin, withKey }) {
  const lines = [`curl -sS --fail-with-body ${shellWord(`${origin}/generate`)}`];
  if (withKey) lines.push('-H "authorization: Bearer $LUMINA_API_KEY"');
  lines.push("-H 'content-type: application/json'");
  if (single(body)) lines.push(`-H 'accept: image/${body.output_format ?? "png"}'`);
  lines.push(`--data-raw ${shellWord(JSON.stringify(body))}`);
  if (single(body)) lines.push(`-o lumina-${body.seed}.${extension(body)}`);
  return lines.join(" \\\n  ");
}

/** A Python script without dependencies that saves every picture. */
export function python(body, { origin, withKey }) {
  const key = withKey ? 'HEADERS = {"authorization": "Bearer " + os.environ["LUMINA_API_KEY"]}' : "HEADERS = {}";
  return `import json
${withKey ? "import os\n" : ""}from pathlib import Path
from urllib.request import Request, urlopen

URL = ${JSON.stringify(origin)}
${key}
body = ${pythonLiteral(body)}

request = Request(
    URL + "/generate",
    data=json.dumps(body).encode(),
    headers={"content-type": "application/json", **HEADERS},
)
with urlopen(request) as answer:
    job = json.load(answer)
for image in job["images"]:
    with urlopen(Request(URL + image["url"], headers=HEADERS)) as answer:
        Path(f"lumina-{image['seed']}.${extension(body)}").write_bytes(answer.read())
`;
}
