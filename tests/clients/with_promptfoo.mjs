// promptfoo: its providers for chat and completions, with assertions on what base and adapter say.
import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { ASKS, URL_, check } from "./checks.mjs";

await check("eval: chat, base and adapters", () => {
  const provider = (model) => ({ id: `openai:chat:${model}`, label: model, config: { apiBaseUrl: `${URL_}/v1`, apiKey: "none", temperature: 0 } });
  const cases = ["base", "formats", "words"].map((name) => ASKS[name]);
  for (const { model, prompt, answer } of cases) {
    const tests = [{ vars: { prompt }, assert: [{ type: "equals", value: answer }] }];
    writeFileSync("config.json", JSON.stringify({ prompts: ["{{prompt}}"], providers: [provider(model)], tests }));
    const env = { ...process.env, PROMPTFOO_DISABLE_TELEMETRY: "1", PROMPTFOO_DISABLE_UPDATE: "1", PROMPTFOO_CONFIG_DIR: "." };
    try {
      execFileSync("promptfoo", ["eval", "-c", "config.json", "-o", "out.json", "--no-cache", "--no-progress-bar"], { env, stdio: "pipe" });
    } catch (error) {
      throw new Error(`${error.stdout}`.trim().slice(-300) + `${error.stderr}`.trim().slice(-300));
    }
    const { stats } = JSON.parse(readFileSync("out.json", "utf8")).results;
    assert.deepEqual([stats.successes, stats.failures, stats.errors], [1, 0, 0]);
  }
});
