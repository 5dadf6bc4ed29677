// Drives a running server with the official openai package, as its users do.
// POLYLORA_URL: a server on the demo model with the adapter `pirate`.
// POLYLORA_SMALL_URL: one with an API key, one place and a deadline of two seconds.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import OpenAI from "openai";

const { POLYLORA_URL: url, POLYLORA_SMALL_URL: smallUrl, POLYLORA_SMALL_KEY: key } = process.env;
const base = process.env.POLYLORA_BASE ?? "smollm2-135m-instruct";
const adapter = process.env.POLYLORA_ADAPTER ?? "pirate";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const small = new OpenAI({ baseURL: `${smallUrl}/v1`, apiKey: key, maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];

const raises = async (kind, code, call) => {
  try {
    await call();
  } catch (e) {
    assert.ok(e instanceof kind, `${e} is no ${kind.name}`);
    assert.equal(e.code, code);
    return e;
  }
  assert.fail(`no ${kind.name}`);
};

const tests = {
  async models() {
    const listed = [];
    for await (const model of client.models.list()) listed.push(model.id);
    assert.ok(listed.includes(base) && listed.includes(adapter), listed.join());
    assert.equal((await client.models.retrieve(adapter)).id, adapter);
  },

  async chat() {
    const { data, response } = await client.chat.completions
      .create({ model: adapter, messages, max_completion_tokens: 12, temperature: 0 })
      .withResponse();
    assert.equal(data.choices[0].message.role, "assistant");
    assert.ok(data.choices[0].message.content);
    assert.equal(data.usage.total_tokens, data.usage.prompt_tokens + data.usage.completion_tokens);
    assert.equal(response.headers.get("x-polylora-adapter"), `${adapter}@1`);
  },

  async streaming() {
    const ask = { model: base, messages, max_tokens: 16, temperature: 0 };
    const whole = (await client.chat.completions.create(ask)).choices[0].message.content;
    const stream = await client.chat.completions.create({
      ...ask, stream: true, stream_options: { include_usage: true },
    });
    let text = "";
    let usage;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole);
    assert.ok(usage.completion_tokens > 0);
    const stop = whole.slice(6, 9);
    const runner = client.chat.completions.stream({ ...ask, stop });
    assert.equal(await runner.finalContent(), whole.slice(0, whole.indexOf(stop)));
  },

  async choicesAndLogprobs() {
    const answer = await client.chat.completions.create({
      model: base, messages, n: 2, seed: 1, max_tokens: 8, logprobs: true, top_logprobs: 3,
    });
    assert.deepEqual(answer.choices.map((c) => c.index), [0, 1]);
    for (const choice of answer.choices)
      for (const token of choice.logprobs.content) assert.equal(token.top_logprobs.length, 3);
  },

  async completions() {
    const answer = await client.completions.create({
      model: base, prompt: "The sky is", max_tokens: 4, echo: true, logprobs: 2,
    });
    assert.ok(answer.choices[0].text.startsWith("The sky is"));
    assert.equal(answer.choices[0].logprobs.token_logprobs[0], null);
  },

  async exceptions() {
    const ask = (more) => () =>
      client.chat.completions.create({ model: base, messages, max_tokens: 1, ...more });
    const e = await raises(OpenAI.NotFoundError, "model_not_found", ask({ model: "nobody" }));
    assert.equal(e.param, "model");
    await raises(OpenAI.BadRequestError, "invalid_value", ask({ temperature: 9 }));
    await raises(OpenAI.BadRequestError, "unknown_parameter", ask({ temprature: 1 }));
    const stranger = new OpenAI({ baseURL: `${smallUrl}/v1`, apiKey: "wrong", maxRetries: 0 });
    await raises(OpenAI.AuthenticationError, "invalid_api_key", () => stranger.models.list());
  },

  async files() {
    const line = '{"prompt": "a", "completion": "b"}\n';
    const data = new TextEncoder().encode(line.repeat(500));
    const file = await OpenAI.toFile(data, "train.jsonl");
    const made = await client.files.create({ file, purpose: "fine-tune" });
    assert.deepEqual([made.object, made.filename, made.bytes], ["file", "train.jsonl", data.length]);
    const done = await client.files.waitForProcessing(made.id, { pollInterval: 100 });
    assert.equal(done.status, "processed");
    assert.deepEqual(await client.files.retrieve(made.id), done);
    const content = await client.files.content(made.id);
    assert.equal(await content.text(), line.repeat(500));
    const upload = await client.uploads.create({
      bytes: data.length, filename: "parts.jsonl", mime_type: "text/jsonl", purpose: "fine-tune",
    });
    const halves = [data.slice(0, 1000), data.slice(1000)];
    // The second half comes first.
    const part_ids = [];
    for (const half of halves.reverse()) {
      const part = await client.uploads.parts.create(upload.id, { data: await OpenAI.toFile(half, "x") });
      part_ids.unshift(part.id);
    }
    const whole = await client.uploads.complete(upload.id, { part_ids });
    assert.equal(whole.status, "completed");
    assert.equal(await (await client.files.content(whole.file.id)).text(), line.repeat(500));
    const listed = [];
    for await (const one of client.files.list({ limit: 1 })) listed.push(one.id);
    assert.deepEqual(listed, [whole.file.id, made.id]);
    for (const id of listed) assert.ok((await client.files.delete(id)).deleted);
    const gone = () => client.files.retrieve(made.id);
    await raises(OpenAI.NotFoundError, "file_not_found", gone);
  },

  async fineTuning() {
    const lines = (await readFile("adapters/butler/train.jsonl", "utf8")).split("\n").slice(0, 8);
    const file = await OpenAI.toFile(new TextEncoder().encode(lines.join("\n")), "train.jsonl");
    const data = await client.files.create({ file, purpose: "fine-tune" });
    const jobs = client.fineTuning.jobs;
    const hyperparameters = { n_epochs: 2, batch_size: 4, learning_rate_multiplier: "auto" };
    let job = await jobs.create({
      model: base, training_file: data.id, suffix: "house", hyperparameters,
    });
    while (!["succeeded", "failed", "cancelled"].includes(job.status)) {
      await new Promise((done) => setTimeout(done, 200));
      job = await jobs.retrieve(job.id);
    }
    assert.equal(job.status, "succeeded", JSON.stringify(job));
    const steps = [];
    for await (const event of jobs.listEvents(job.id, { limit: 2 })) {
      if (event.type === "metrics") steps.unshift(event.data.step);
    }
    assert.deepEqual(steps, [1, 2, 3, 4]);
    const checkpoints = [];
    for await (const one of jobs.checkpoints.list(job.id)) checkpoints.push(one.step_number);
    assert.deepEqual(checkpoints, [2]);
    const csv = await (await client.files.content(job.result_files[0])).text();
    assert.equal(csv.trim().split("\n").length, 5);
    const answer = await client.chat.completions.create({
      model: job.fine_tuned_model, messages, max_tokens: 8,
    });
    assert.ok(answer.choices[0].message.content);
    const over = () => jobs.cancel(job.id);
    await raises(OpenAI.ConflictError, "fine_tuning_job_over", over);
    assert.ok((await client.models.delete("house")).deleted);
    for (const id of [data.id, ...job.result_files]) await client.files.delete(id);
  },

  async failingInMidStream() {
    const stream = await small.chat.completions.create({
      model: base, messages, max_tokens: 1800, ignore_eos: true, stream: true,
    });
    let seen = 0;
    await raises(OpenAI.APIError, "request_timeout", async () => {
      for await (const _ of stream) seen += 1;
    });
    assert.ok(seen > 1, "tokens came first");
  },

  async rateLimited() {
    const one = () =>
      small.chat.completions.create({ model: base, messages, max_tokens: 1800, ignore_eos: true });
    const outcomes = await Promise.allSettled([one(), one(), one(), one()]);
    const limited = outcomes.filter((o) => o.reason instanceof OpenAI.RateLimitError);
    assert.ok(limited.length > 0, outcomes.map((o) => String(o.reason)).join());
    assert.equal(limited[0].reason.code, "queue_full");
  },

  async hangingUp() {
    const stream = await client.chat.completions.create({
      model: base, messages, max_tokens: 1500, stream: true,
    });
    for await (const _ of stream) break;
  },
};

for (const [name, test] of Object.entries(tests)) {
  await test();
  console.log(`node: ${name} ok`);
}
