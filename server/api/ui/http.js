// Calls to this service, and its problems as errors in words.
import { forget, keep, load } from "./storage.js";

let key = load("key", null);
let onUnauthorized = () => {};

export class Problem extends Error {
  /** `status` is 0 where no answer came; `fields` holds {field, detail}. */
  constructor(message, { status = 0, code = "", fields = [], retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, fields, retryAfter });
  }
}

export const hasKey = () => key !== null;

export function setKey(text) {
  key = text || null;
  if (key) keep("key", key);
  else forget("key");
}

/** What to do when the service asks for a key. */
export function askForKey(handler) {
  onUnauthorized = handler;
}

/** fetch() that carries the key and throws a Problem unless the answer is good. */
export async function request(path, { headers = {}, ...options } = {}) {
  const given = key ? { ...headers, authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: given });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The service cannot be reached.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const problem = new Problem(body.detail || `The service answered ${response.status}.`, {
    status: response.status,
    code: body.code,
    fields: body.errors ?? [],
    retryAfter: Number(response.headers.get("retry-after")) || null,
  });
  if (response.status === 401) onUnauthorized(problem);
  throw problem;
}

export const getJson = async (path) => (await request(path)).json();

export async function postJson(path, body, headers = {}) {
  const response = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify(body),
  });
  return response.json();
}
