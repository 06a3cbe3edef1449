// Server-sent events over fetch(): unlike EventSource it can carry the API key.
import { request } from "./http.js";

/** Yields {id, event, data} of a stream until it ends; `lastId` resumes behind that event. */
export async function* events(path, lastId, signal) {
  const headers = { accept: "text/event-stream" };
  if (lastId) headers["last-event-id"] = lastId;
  const response = await request(path, { headers, signal });
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value.replaceAll("\r", "");
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const event = parse(block);
      if (event) yield event;
    }
  }
}

function parse(block) {
  const found = { id: "", event: "message", data: [] };
  for (const line of block.split("\n")) {
    const [, name, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (name === "data") found.data.push(value);
    else if (name === "id" || name === "event") found[name] = value;
  }
  return found.data.length ? { ...found, data: found.data.join("\n") } : null;
}
