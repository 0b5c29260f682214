// openai: OpenAI's own client for JavaScript.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { ASKS, SCHEMA, TOOL, URL_, answers, check, fits } from "./checks.mjs";

const client = new OpenAI({ baseURL: `${URL_}/v1`, apiKey: "none", maxRetries: 0, timeout: 60000 });
const asked = (model, prompt) => ({ model, messages: [{ role: "user", content: prompt }], temperature: 0 });
const chat = (body) => client.chat.completions.create(body);

await check("models", async () => {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  assert.ok(["base", "formats", "words"].every((name) => found.includes(name)));
});

await check("chat, base and adapters", () =>
  answers(async (model, prompt) => (await chat(asked(model, prompt))).choices[0].message.content),
);

await check("streamed chat with usage", async () => {
  const stream = await chat({ ...asked("formats", "2024-03-05"), stream: true, stream_options: { include_usage: true } });
  let text = "", usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  const whole = await chat(asked("formats", "2024-03-05"));
  assert.equal(text, ASKS.formats.answer);
  assert.equal(usage.total_tokens, whole.usage.total_tokens);
});

await check("a JSON schema", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "ticket", schema: SCHEMA, strict: true } };
  fits(JSON.parse((await chat({ ...asked("base", "x"), response_format })).choices[0].message.content));
});

await check("runTools: a tool is called and its result sent back", async () => {
  const called = [];
  const runner = client.chat.completions.runTools({
    ...asked("formats", "Weather in Oslo?"),
    tool_choice: { type: "function", function: { name: TOOL.name } },
    max_tokens: 200,
    tools: [{ type: "function", function: { ...TOOL, parse: JSON.parse, function: ({ city }) => (called.push(city), "rain") } }],
  });
  await runner.done();
  assert.ok(called.length > 0 && called.every((city) => ["Oslo", "Paris"].includes(city)));
  assert.ok(runner.messages.some((message) => message.role === "tool" && message.content === "rain"));
});

await check("embeddings", async () => {
  const [one, other] = await Promise.all(
    ["base", "formats"].map(async (model) => (await client.embeddings.create({ model, input: "2024" })).data[0].embedding),
  );
  assert.equal(one.length, other.length);
  assert.notDeepEqual(one, other);
});

await check("an error is openai's", () =>
  assert.rejects(chat(asked("nobody", "x")), (error) => error instanceof OpenAI.NotFoundError && error.code === "model_not_found"),
);
