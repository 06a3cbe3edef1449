// The page at "/docs": shows openapi.json. Everything is put in as text, never as markup.
"use strict";

let schemas = {};

function element(name, text = "", children = [], attributes = {}) {
  const made = document.createElement(name);
  if (text) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Text in which words between backticks are code. */
function prose(name, text) {
  const parts = text.split(/`([^`]+)`/);
  return element(name, "", parts.map((part, index) => (index % 2 ? element("code", part) : part)));
}

function resolved(schema) {
  if (!schema || !schema.$ref) return schema || {};
  return schemas[schema.$ref.split("/").pop()] || {};
}

/** The kind of value a schema allows, in a few words. */
function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) {
    return schema.anyOf.map(kind).filter((each) => each !== "null").join(" or ");
  }
  if (schema.type === "array") return `list of ${kind(schema.items)}`;
  return schema.type || "";
}

function table(rows) {
  const lines = rows.map(([name, what, description]) =>
    element("tr", "", [
      element("th", "", [element("code", name)], { scope: "row" }),
      element("td", what, [], { class: "quiet" }),
      prose("td", description),
    ]));
  return element("table", "", [element("tbody", "", lines)]);
}

function shown(value) {
  return element("pre", typeof value === "string" ? value : JSON.stringify(value, null, 2), [], {
    tabindex: "0",
  });
}

/** The examples of one content, each with its title. */
function examples(content) {
  if (content.example !== undefined) return [["", content.example]];
  return Object.entries(content.examples || {}).map(([name, each]) => [
    each.summary || name, each.value,
  ]);
}

function parameters(operation) {
  const given = operation.parameters || [];
  if (!given.length) return [];
  const rows = given.map((each) => [
    each.name, `${each.in}${each.required ? ", required" : ""}`,
    [kind(each.schema), each.description].filter(Boolean).join(": "),
  ]);
  return [element("h3", "Parameters"), table(rows)];
}

function body(path, operation) {
  const content = operation.requestBody && operation.requestBody.content["application/json"];
  if (!content) return [];
  const schema = resolved(content.schema);
  const required = new Set(schema.required || []);
  const rows = Object.entries(schema.properties || {}).map(([name, each]) => [
    name, required.has(name) ? "required" : "", each.description || kind(each),
  ]);
  const calls = examples(content).map(([title, value]) =>
    element("details", "", [
      element("summary", title),
      shown(`curl ${location.origin}${path} \\\n  -H 'content-type: application/json' \\\n` +
        `  -d '${JSON.stringify(value).replaceAll("'", "'\\''")}'`),
    ], { open: "" }));
  return [element("h3", "Body"), ...calls, table(rows)];
}

function answers(operation) {
  return [element("h3", "Answers"), ...Object.entries(operation.responses).map(([status, each]) => {
    const parts = Object.entries(each.content || {}).flatMap(([media, content]) => [
      element("p", [media, kind(content.schema)].filter(Boolean).join(": "), [], { class: "quiet" }),
      ...examples(content).map(([, value]) => shown(value)),
    ]);
    return element("details", "", [prose("summary", `${status} ${each.description}`), ...parts]);
  })];
}

function section(method, path, operation) {
  const name = `${method.toUpperCase()} ${path}`;
  const id = name.replace(/[^A-Za-z]+/g, "-");
  document.getElementById("index").append(element("a", name, [], { href: `#${id}` }));
  return element("section", "", [
    element("h2", name),
    element("p", operation.summary, [], { class: "quiet" }),
    ...(operation.description || "").split("\n\n").map((text) => prose("p", text)),
    ...parameters(operation), ...body(path, operation), ...answers(operation),
  ], { id });
}

async function start() {
  const state = document.getElementById("state");
  try {
    const answer = await fetch("/openapi.json");
    const openapi = await answer.json();
    if (!answer.ok) throw new Error(openapi.detail);
    schemas = openapi.components.schemas;
    for (const [path, methods] of Object.entries(openapi.paths)) {
      for (const [method, operation] of Object.entries(methods)) {
        document.getElementById("endpoints").append(section(method, path, operation));
      }
    }
    state.remove();
  } catch (error) {
    state.textContent = `The description of the API could not be read: ${error.message}`;
  }
}

start();
