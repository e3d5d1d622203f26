// OpenAI's own client for Node.
import assert from "node:assert/strict";
import { test } from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const served = JSON.parse(process.env.STARFISH_SERVED);
const messages = [{ role: "user", content: "What is a starfish?" }];
const parameters = {
  type: "object",
  properties: { arms: { type: "integer", minimum: 0, maximum: 9 } },
  required: ["arms"],
  additionalProperties: false,
};
const grow = { type: "function", function: { name: "grow", parameters } };

const client = (options = {}) =>
  new OpenAI({ baseURL: `${served.url}/v1`, apiKey: served.key, maxRetries: 0, ...options });
const scripted = client({ baseURL: `${served.scripted_url}/v1`, apiKey: "none" });

async function waitIdle() {
  const headers = { Authorization: `Bearer ${served.key}` };
  for (let tries = 0; tries < 600; tries++) {
    const load = await (await fetch(`${served.url}/load`, { headers })).json();
    if (load.server_load === 0) return;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  assert.fail("a session that its client has left still runs");
}

test("a chat says the same whole and streamed", async () => {
  const common = { model: served.model, messages, max_tokens: 24, temperature: 0 };
  const whole = await client().chat.completions.create(common);
  const stream = client().chat.completions.stream(common);
  assert.ok(whole.choices[0].message.content);
  assert.equal((await stream.finalMessage()).content, whole.choices[0].message.content);
});

test("a forced call has valid arguments", async () => {
  const answer = await client().chat.completions.create({
    model: served.model,
    messages,
    tools: [grow],
    tool_choice: "required",
    max_tokens: 120,
    temperature: 0,
  });
  const [call] = answer.choices[0].message.tool_calls;
  assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)), ["arms"]);
});

test("objects follow their schema", async () => {
  const arms = z.strictObject({ arms: z.int().min(0).max(9), alive: z.boolean() });
  const chat = await client().chat.completions.parse({
    model: served.model,
    messages,
    response_format: zodResponseFormat(arms, "arms"),
    max_tokens: 60,
  });
  const response = await client().responses.parse({
    model: served.model,
    input: "How many arms?",
    text: { format: zodTextFormat(arms, "arms") },
    max_output_tokens: 60,
  });
  for (const parsed of [chat.choices[0].message.parsed, response.output_parsed])
    assert.ok(arms.safeParse(parsed).success);
});

test("a call is streamed", async () => {
  const stream = scripted.chat.completions.stream({
    model: served.scripted_model,
    messages,
    tools: [grow],
  });
  const message = await stream.finalMessage();
  assert.equal(message.content, "Let me grow.");
  assert.equal(JSON.parse(message.tool_calls[0].function.arguments).arms, 5);
});

for (const stream of [false, true]) {
  test(`an agent, ${stream ? "streamed" : "whole"}`, async () => {
    const agent = client({ baseURL: `${served.agent_url}/v1`, apiKey: "none" });
    const text = { type: "string" };
    const described = (name, names, run) => {
      const properties = Object.fromEntries(names.map((each) => [each, text]));
      const schema = { type: "object", properties, required: names };
      const own = { name, description: name, parameters: schema, parse: JSON.parse, function: run };
      return { type: "function", function: own };
    };
    const runner = agent.chat.completions.runTools({
      model: served.scripted_model,
      messages: [{ role: "user", content: "Compare Vega and Mira." }],
      tools: [
        described("colour", ["star"], ({ star }) => (star === "Vega" ? "white" : "crimson")),
        described("compare", ["first", "second"], (each) => `${each.first} ≠ ${each.second}.`),
      ],
      stream,
    });
    const found = "Vega is white, Mira 🌟 is crimson: white ≠ crimson.";
    assert.equal(await runner.finalContent(), `${found} No thought.`); // the runner drops reasoning
  });
}

test("the Responses API streams text and a call", async () => {
  const stream = scripted.responses.stream({
    model: served.scripted_model,
    input: "Grow.",
    tools: [{ type: "function", strict: true, ...grow.function }],
  });
  const response = await stream.finalResponse();
  assert.equal(response.output_text, "Let me grow.");
  assert.ok(response.output.some((item) => item.type === "function_call"));
});

test("errors are the client's own", async () => {
  const ask = (own, options) =>
    own.chat.completions.create({ model: served.model, messages, max_tokens: 4, ...options });
  await assert.rejects(ask(client({ apiKey: "wrong" })), OpenAI.AuthenticationError);
  await assert.rejects(ask(client(), { model: "gpt-unknown" }), OpenAI.NotFoundError);
  await assert.rejects(ask(client(), { temperature: 9 }), OpenAI.BadRequestError);
});

test("a 429 is retried", async () => {
  const narrow = client({ apiKey: served.narrow_key });
  const long = { model: served.model, prompt: "Once", max_tokens: 1500, ignore_eos: true };
  const holder = await narrow.completions.create({ ...long, stream: true });
  const statuses = [];
  const noted = async (url, init) => {
    const response = await fetch(url, init);
    statuses.push(response.status);
    if (response.status === 429) holder.controller.abort();
    return response;
  };
  const patient = client({ apiKey: served.narrow_key, maxRetries: 5, fetch: noted });
  await patient.completions.create({ model: served.model, prompt: "Once", max_tokens: 4 });
  assert.equal(statuses[0], 429);
  assert.equal(statuses.at(-1), 200);
});

test("who leaves ends the session", async () => {
  const long = { model: served.model, prompt: "Once", max_tokens: 1500, ignore_eos: true };
  const hurried = client({ timeout: 50 });
  await assert.rejects(hurried.completions.create(long), OpenAI.APIConnectionTimeoutError);
  await waitIdle();
  const stream = await client().completions.create({ ...long, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.object, "text_completion");
    break;
  }
  await waitIdle();
});
