// OpenAI's client for node and Vercel's ai-sdk, run by test_node_clients.py: clients.mjs URL
import assert from "node:assert/strict";
import OpenAI from "openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, jsonSchema, streamObject, streamText, tool } from "ai";
import { z } from "zod";

const [url] = process.argv.slice(2);
const question = "What does the fox eat?";
const messages = [{ role: "user", content: question }];
const common = { model: "base", max_tokens: 600, seed: 1 };
const animal = z.object({ name: z.string().max(8), legs: z.number().int().min(2).max(8), diet: z.enum(["mice", "fish"]) });
const parameters = z.toJSONSchema(animal);

// openai
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
assert((await client.models.list()).data.some(({ id }) => id === "shout"));
const plain = await client.chat.completions.create({ ...common, model: "shout", messages, temperature: 0 });
assert(plain.choices[0].message.content.includes("THE FOX"));
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...common, model: "shout", messages, temperature: 0, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
assert.equal(streamed, plain.choices[0].message.content);
const format = { type: "json_schema", json_schema: { name: "animal", strict: true, schema: parameters } };
const parsed = await client.chat.completions.parse({ ...common, messages, response_format: format });
animal.parse(JSON.parse(parsed.choices[0].message.content));
const tools = [{ type: "function", function: { name: "get_animal", parameters } }];
const called = await client.chat.completions.create({ ...common, messages, tools, tool_choice: "required", parallel_tool_calls: false });
animal.parse(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments));
const runner = client.chat.completions.stream({ ...common, messages, tools, tool_choice: "required", parallel_tool_calls: false });
animal.parse(JSON.parse((await runner.finalChatCompletion()).choices[0].message.tool_calls[0].function.arguments));
const response = await client.responses.create({ model: "shout", input: question, max_output_tokens: 60, temperature: 0 });
assert(response.output_text.includes("THE FOX"));
assert.equal((await client.embeddings.create({ model: "base", input: ["a", "b"] })).data.length, 2);
await assert.rejects(client.chat.completions.create({ ...common, model: "nobody", messages }), OpenAI.NotFoundError);
console.log("openai");

// ai-sdk, by its provider for servers like this one and by its provider for OpenAI
const compatible = createOpenAICompatible({ name: "gguflora", baseURL: url, supportsStructuredOutputs: true });
const theirs = createOpenAI({ baseURL: url, apiKey: "none" });
const limits = { maxOutputTokens: 600, seed: 1, maxRetries: 0 };
for (const make of [(name) => compatible(name), (name) => theirs.chat(name), (name) => theirs.responses(name)]) {
  const { seed, ...rest } = limits;
  const options = make("base").provider.includes("responses") ? rest : limits;
  const { text, usage } = await generateText({ model: make("shout"), prompt: question, temperature: 0, ...options });
  assert(text.includes("THE FOX"));
  assert(usage.outputTokens > 0);
  let whole = "";
  for await (const part of streamText({ model: make("shout"), prompt: question, temperature: 0, ...options }).textStream) whole += part;
  assert.equal(whole, text);
  const { object } = await generateObject({ model: make("base"), schema: animal, prompt: question, ...options });
  animal.parse(object);
  const stream = streamObject({ model: make("base"), schema: animal, prompt: question, ...options });
  let parts = 0;
  for await (const _ of stream.partialObjectStream) parts += 1;
  assert(parts > 0);
  animal.parse(await stream.object);
  let ran = 0;
  const asked = await generateText({
    model: make("base"),
    prompt: question,
    tools: { get_animal: tool({ inputSchema: animal, execute: async () => { ran += 1; return "a fox"; } }) },
    toolChoice: "required",
    ...options,
  });
  assert(asked.toolCalls.length >= 1 && ran >= 1);
  animal.parse(asked.toolCalls[0].input);
  console.log(make("base").provider);
}
