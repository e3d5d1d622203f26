// The AI SDK: its OpenAI provider (which uses the Responses API unless told otherwise), and the one
// for servers that are compatible with OpenAI's.
import assert from "node:assert/strict";
import { test } from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, Output, streamText, tool } from "ai";
import { z } from "zod";

const served = JSON.parse(process.env.STARFISH_SERVED);
const real = { baseURL: `${served.url}/v1`, apiKey: served.key };
const script = { baseURL: `${served.scripted_url}/v1`, apiKey: "none" };
const compatible = (where) =>
  createOpenAICompatible({
    name: "starfish",
    supportsStructuredOutputs: true,
    includeUsage: true,
    ...where,
  });
const providers = {
  responses: (where) => createOpenAI(where).responses,
  chat: (where) => createOpenAI(where).chat,
  compatible,
};
const arms = z.strictObject({ arms: z.int().min(0).max(9), alive: z.boolean() });
const grow = tool({
  description: "Grows arms.",
  inputSchema: z.strictObject({ arms: z.int().min(0).max(9), note: z.string().max(12) }),
});

for (const [name, provider] of Object.entries(providers)) {
  const model = provider(real)(served.model);
  const scripted = provider(script)(served.scripted_model);

  test(`${name}: a text says the same whole and streamed`, async () => {
    const common = { model, prompt: "What is a starfish?", maxOutputTokens: 24, temperature: 0 };
    const whole = await generateText(common);
    const stream = streamText(common);
    let text = "";
    for await (const part of stream.textStream) text += part;
    assert.ok(text);
    assert.equal(text, whole.text);
    assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);
  });

  test(`${name}: an object follows its schema`, async () => {
    const answer = await generateText({
      model,
      prompt: "How many arms?",
      output: Output.object({ schema: arms }),
      maxOutputTokens: 120,
      temperature: 0,
    });
    assert.ok(arms.safeParse(answer.output).success);
  });

  test(`${name}: a forced call follows its schema`, async () => {
    const answer = await generateText({
      model,
      prompt: "Grow.",
      tools: { grow },
      toolChoice: "required",
      maxOutputTokens: 120,
      temperature: 0,
    });
    assert.ok(grow.inputSchema.safeParse(answer.toolCalls[0].input).success);
  });

  test(`${name}: a call is streamed`, async () => {
    const stream = streamText({ model: scripted, prompt: "Grow.", tools: { grow } });
    const [call] = await stream.toolCalls;
    assert.equal(await stream.text, "Let me grow.");
    assert.deepEqual(call.input, { arms: 5, note: "fünf 🌟" });
    if (name === "compatible") assert.equal(await stream.reasoningText, "How many arms?");
  });

  test(`${name}: errors carry their status`, async () => {
    const ask = (options) => generateText({ prompt: "hi", maxRetries: 0, ...options });
    const wrong = provider({ ...real, apiKey: "wrong" })(served.model);
    const is = (status) => (error) => APICallError.isInstance(error) && error.statusCode === status;
    await assert.rejects(ask({ model: wrong }), is(401));
    await assert.rejects(ask({ model: provider(real)("gpt-unknown") }), is(404));
  });
}
