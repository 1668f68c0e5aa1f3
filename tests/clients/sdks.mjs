// The JavaScript SDKs that many agents are built on, against the server named on the command line: one answer of each API,
// streamed, with a call. Prints what they understood as JSON.

import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const url = process.argv[2];
const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
const messages = [{ role: "user", content: "Weather in Paris?" }];
const openai = new OpenAI({ baseURL: `${url}/v1`, apiKey: "any", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: url, apiKey: "any", maxRetries: 0 });

const chat = await openai.chat.completions
  .stream({ model: "m", messages, tools: [{ type: "function", function: { name: "weather", parameters } }] })
  .finalChatCompletion();
const call = chat.choices[0].message.tool_calls[0].function;

const response = await openai.responses
  .stream({ model: "m", input: "Weather in Paris?", tools: [{ type: "function", name: "weather", parameters }] })
  .finalResponse();
const item = response.output.find((one) => one.type === "function_call");

const message = await anthropic.messages
  .stream({ model: "m", max_tokens: 2000, thinking: { type: "adaptive" }, messages, tools: [{ name: "weather", input_schema: parameters }] })
  .finalMessage();
const use = message.content.find((block) => block.type === "tool_use");

console.log(JSON.stringify({
  chat: [call.name, JSON.parse(call.arguments), chat.usage.prompt_tokens > 0],
  responses: [item.name, JSON.parse(item.arguments), response.output_text],
  messages: [use.name, use.input, message.content.map((block) => block.type), message.stop_reason],
}));
