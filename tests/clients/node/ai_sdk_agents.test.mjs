// The AI SDK's agents: calls at once, their results, more calls, an answer.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const served = JSON.parse(process.env.STARFISH_SERVED);
const where = { baseURL: `${served.agent_url}/v1`, apiKey: "none" };
const openai = createOpenAI(where);
const found = "Vega is white, Mira 🌟 is crimson: white differs from crimson.";
// The chat of the provider for OpenAI drops reasoning; without `store`, that of responses does, too.
const ways = {
  responses: { model: openai.responses(served.scripted_model), thought: true },
  "responses that are not stored": {
    model: openai.responses(served.scripted_model),
    providerOptions: { openai: { store: false } },
    thought: false,
  },
  chat: { model: openai.chat(served.scripted_model), thought: false },
  compatible: {
    model: createOpenAICompatible({ name: "starfish", ...where })(served.scripted_model),
    thought: true,
  },
};

// Vega's colour is known after Mira's.
function tools() {
  let other;
  const otherIsKnown = new Promise((resolve) => (other = resolve));
  return {
    colour: tool({
      inputSchema: z.object({ star: z.string() }),
      execute: async ({ star }) => {
        if (star !== "Vega") {
          other();
          return "crimson";
        }
        await otherIsKnown;
        return "white";
      },
    }),
    compare: tool({
      inputSchema: z.object({ first: z.string(), second: z.string() }),
      execute: ({ first, second }) => `${first} differs from ${second}.`,
    }),
  };
}

for (const [name, { thought, ...way }] of Object.entries(ways)) {
  const common = () => ({
    ...way,
    tools: tools(),
    prompt: "Compare Vega and Mira.",
    stopWhen: stepCountIs(4),
    maxRetries: 0,
  });
  const answer = `${found} ${thought ? "Two stars." : "No thought."}`;

  test(`${name}: an agent`, async () => {
    const { text, steps } = await generateText(common());
    assert.deepEqual(steps.map((step) => step.toolCalls.length), [2, 1, 0]);
    assert.equal(text, answer);
  });

  test(`${name}: an agent with streams`, async () => {
    const stream = streamText(common());
    const steps = await stream.steps;
    assert.deepEqual(steps.map((step) => step.toolCalls.length), [2, 1, 0]);
    assert.equal(await stream.text, answer);
  });
}
