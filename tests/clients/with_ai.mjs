// Vercel's ai: its OpenAI-compatible provider, and its OpenAI one by chat and as it is by itself (responses).
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";
import { ASKS, URL_, answers, check, fits } from "./checks.mjs";

const given = { baseURL: `${URL_}/v1`, apiKey: "none" };
const compatible = createOpenAICompatible({ ...given, name: "tucka", includeUsage: true, supportsStructuredOutputs: true });
const openai = createOpenAI(given);
const always = { temperature: 0, maxRetries: 0 };
const ticket = z.object({ kind: z.enum(["bug", "wish"]), urgent: z.boolean() });

for (const [name, provider] of [
  ["openai-compatible", (model) => compatible(model)],
  ["openai by chat", (model) => openai.chat(model)],
  ["openai", (model) => openai(model)],
]) {
  await check(`${name}: generateText, base and adapters`, () =>
    answers(async (model, prompt) => (await generateText({ ...always, model: provider(model), prompt })).text),
  );
  await check(`${name}: streamText`, async () => {
    let text = "";
    const result = streamText({ ...always, model: provider("formats"), prompt: "2024-03-05", onError: () => {} });
    for await (const part of result.textStream) text += part;
    assert.equal(text, ASKS.formats.answer);
    assert.ok((await result.usage).outputTokens > 0);
  });
  await check(`${name}: an object of a zod schema`, async () => {
    const result = await generateText({
      ...always, model: provider("base"), prompt: "x", maxOutputTokens: 200, output: Output.object({ schema: ticket }),
    });
    fits(result.output);
  });
  await check(`${name}: a tool is called and its result sent back`, async () => {
    const called = [];
    const weather = tool({
      description: "Weather of a city",
      inputSchema: z.object({ city: z.enum(["Oslo", "Paris"]) }),
      execute: async ({ city }) => (called.push(city), "rain"),
    });
    const result = await generateText({
      ...always, model: provider("formats"), prompt: "Weather in Oslo?", tools: { weather }, maxOutputTokens: 120,
      toolChoice: "required", stopWhen: ({ steps }) => steps.length >= 2,
    });
    assert.ok(called.length > 0 && called.every((city) => ["Oslo", "Paris"].includes(city)));
    assert.equal(result.steps.length, 2);
  });
}

await check("embed", async () => {
  const [one, other] = await Promise.all(
    ["base", "formats"].map(async (name) => (await embed({ model: compatible.embeddingModel(name), value: "2024" })).embedding),
  );
  assert.equal(one.length, other.length);
  assert.notDeepEqual(one, other);
});
