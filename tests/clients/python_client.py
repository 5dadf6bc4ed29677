"""Drives a running server with the official openai package, as its users do.

POLYLORA_URL: a server on the demo model with the adapter `pirate`.
POLYLORA_SMALL_URL: one with an API key, one place and a deadline of two seconds.
"""

import asyncio
import hashlib
import os
import threading
import time

import openai
from openai import AsyncOpenAI, OpenAI

URL = os.environ["POLYLORA_URL"]
SMALL = os.environ["POLYLORA_SMALL_URL"]
KEY = os.environ["POLYLORA_SMALL_KEY"]
BASE = os.environ.get("POLYLORA_BASE", "smollm2-135m-instruct")
ADAPTER = os.environ.get("POLYLORA_ADAPTER", "pirate")

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
small = OpenAI(base_url=f"{SMALL}/v1", api_key=KEY, max_retries=0)
HELLO = [{"role": "user", "content": "Say hello."}]


def raises(kind, code, call):
    try:
        call()
    except kind as e:
        assert e.code == code, (e.code, code)
        return e
    raise AssertionError(f"no {kind.__name__}")


def models():
    listed = {m.id: m for m in client.models.list()}
    assert BASE in listed and ADAPTER in listed, listed
    assert listed[ADAPTER].parent == BASE
    assert client.models.retrieve(ADAPTER).id == ADAPTER


def chat():
    answer = client.chat.completions.create(
        model=ADAPTER, messages=HELLO, max_completion_tokens=12, temperature=0
    )
    choice = answer.choices[0]
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens >= 0
    assert answer.system_fingerprint.startswith("fp_")
    raw = client.chat.completions.with_raw_response.create(
        model=ADAPTER, messages=HELLO, max_tokens=1
    )
    assert raw.headers["x-polylora-adapter"] == f"{ADAPTER}@1"
    assert raw.headers["x-polylora-digest"].startswith("sha256:")
    assert raw.parse().choices


def streaming():
    ask = dict(model=BASE, messages=HELLO, max_tokens=16, temperature=0)
    whole = client.chat.completions.create(**ask).choices[0].message.content
    chunks = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **ask
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole, (text, whole)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens > 0
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    # The package's own accumulator takes "length" for a failure: end by a stop string.
    stop = whole[6:9]
    with client.chat.completions.stream(stop=stop, **ask) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.content == whole[: whole.index(stop)]
    assert final.finish_reason == "stop"


def choices_and_logprobs():
    answer = client.chat.completions.create(
        model=BASE, messages=HELLO, n=3, seed=1, max_tokens=8, logprobs=True, top_logprobs=5
    )
    assert [c.index for c in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        scored = choice.logprobs.content
        assert scored and all(len(t.top_logprobs) == 5 and t.logprob <= 0 for t in scored)
        text = b"".join(bytes(t.bytes) for t in scored).decode(errors="replace")
        assert text.startswith(choice.message.content), (text, choice.message.content)


def completions():
    answer = client.completions.create(
        model=BASE, prompt=["The sky is", "Water is"], max_tokens=4, echo=True, logprobs=2, n=2
    )
    assert len(answer.choices) == 4
    first = answer.choices[0]
    assert first.text.startswith("The sky is")
    scores = first.logprobs
    assert scores.token_logprobs[0] is None
    lists = (scores.tokens, scores.token_logprobs, scores.top_logprobs, scores.text_offset)
    assert len({len(one) for one in lists}) == 1
    text = "".join(
        c.choices[0].text
        for c in client.completions.create(
            model=BASE, prompt="The sky is", max_tokens=6, stream=True, temperature=0
        )
    )
    assert text


def exceptions():
    ask = lambda **more: lambda: client.chat.completions.create(
        **{"model": BASE, "messages": HELLO, "max_tokens": 1, **more}
    )
    e = raises(openai.NotFoundError, "model_not_found", ask(model="nobody"))
    assert e.param == "model" and e.type == "not_found_error" and e.request_id
    e = raises(openai.BadRequestError, "invalid_value", ask(temperature=9))
    assert e.param == "temperature"
    json_only = ask(response_format={"type": "json_object"})
    raises(openai.BadRequestError, "unsupported_parameter", json_only)
    raises(openai.BadRequestError, "unknown_parameter", ask(extra_body={"temprature": 1}))
    stranger = OpenAI(base_url=f"{SMALL}/v1", api_key="wrong", max_retries=0)
    raises(openai.AuthenticationError, "invalid_api_key", lambda: stranger.models.list())


def endless(**more):
    return small.chat.completions.create(
        model=BASE, messages=HELLO, max_tokens=1800, extra_body={"ignore_eos": True}, **more
    )


def failing_in_mid_stream():
    seen = 0
    try:
        for _ in endless(stream=True):
            seen += 1
    except openai.APIError as e:
        assert seen > 1, "tokens came first"
        assert e.body["code"] == "request_timeout", e.body
        return
    raise AssertionError("the stream ended as if all were well")


def rate_limited():
    outcomes = []

    def one():
        try:
            endless()
            outcomes.append(None)
        except openai.APIStatusError as e:
            outcomes.append(e)

    threads = [threading.Thread(target=one) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    limited = [e for e in outcomes if isinstance(e, openai.RateLimitError)]
    assert limited, outcomes
    assert limited[0].code == "queue_full"
    assert int(limited[0].response.headers["retry-after"]) >= 1


def files():
    line = '{"messages": [{"role": "user", "content": "%d?"}, {"role": "assistant", "content": "yes"}]}\n'
    data = "".join(line % n for n in range(500)).encode()
    made = client.files.create(file=("train.jsonl", data), purpose="fine-tune")
    assert (made.object, made.filename, made.bytes) == ("file", "train.jsonl", len(data))
    done = client.files.wait_for_processing(made.id, poll_interval=0.1)
    assert done.status == "processed" and done.status_details is None, done
    assert client.files.retrieve(made.id) == done
    assert client.files.content(made.id).read() == data
    expires = {"anchor": "created_at", "seconds": 3600}
    nameless = client.files.create(file=data, purpose="fine-tune", expires_after=expires)
    assert nameless.expires_at == nameless.created_at + 3600
    bad = client.files.create(file=("bad.jsonl", b'{"messages": 1}\n'), purpose="fine-tune")
    assert bad.status == "error" and bad.status_details.startswith("line 1: `messages`"), bad
    upload = client.uploads.upload_file_chunked(
        file=data,
        filename="parts.jsonl",
        bytes=len(data),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=len(data) // 3,
        md5=hashlib.md5(data).hexdigest(),
    )
    assert upload.status == "completed" and upload.file.filename == "parts.jsonl", upload
    assert client.files.content(upload.file.id).read() == data
    abandoned = client.uploads.create(
        bytes=3, filename="a", mime_type="text/jsonl", purpose="fine-tune"
    )
    assert client.uploads.parts.create(abandoned.id, data=b"abc").upload_id == abandoned.id
    assert client.uploads.cancel(abandoned.id).status == "cancelled"
    ids = [upload.file.id, bad.id, nameless.id, made.id]
    assert [f.id for f in client.files.list(limit=1, purpose="fine-tune")] == ids, "page by page"
    assert [f.id for f in client.files.list(order="asc")] == ids[::-1]
    for one in ids:
        assert client.files.delete(one).deleted
    assert client.files.list().data == []
    raises(openai.NotFoundError, "file_not_found", lambda: client.files.retrieve(made.id))
    wrong = lambda: client.files.create(file=data, purpose="vision")
    assert raises(openai.BadRequestError, "unsupported_purpose", wrong).param == "purpose"


def ended(job, seconds=300):
    """The job once it is over."""
    until = time.monotonic() + seconds
    while job.status not in ("succeeded", "failed", "cancelled"):
        assert time.monotonic() < until, job
        time.sleep(0.2)
        job = client.fine_tuning.jobs.retrieve(job.id)
    return job


def fine_tuning():
    lines = open("adapters/butler/train.jsonl", "rb").read().splitlines(keepends=True)
    data = client.files.create(file=("train.jsonl", b"".join(lines[:24])), purpose="fine-tune")
    held = client.files.create(file=("held.jsonl", b"".join(lines[50:54])), purpose="fine-tune")
    jobs = client.fine_tuning.jobs
    order = dict(
        model=BASE,
        training_file=data.id,
        validation_file=held.id,
        suffix="butler",
        seed=7,
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4}},
        },
        metadata={"team": "house"},
    )
    job = jobs.create(**order, extra_body={"polylora": {"r": 4, "lr": 5e-3}})
    assert job.status in ("queued", "validating_files", "running"), job
    paused = jobs.pause(job.id)
    assert paused.status == "queued" and paused.polylora["paused"], paused
    jobs.resume(job.id)
    raises(openai.ConflictError, "file_in_use", lambda: client.files.delete(data.id))
    job = ended(job)
    assert job.status == "succeeded" and job.error is None, job
    assert job.fine_tuned_model.startswith("butler@") and job.trained_tokens > 0, job
    assert job.hyperparameters.n_epochs == 2 and job.method.supervised.hyperparameters.batch_size == 4
    assert job.seed == 7 and job.metadata == {"team": "house"}
    told = list(jobs.list_events(job.id, limit=3))
    steps = [event.data for event in reversed(told) if event.type == "metrics"]
    assert [data["step"] for data in steps] == list(range(1, 13)), "page by page, newest first"
    assert steps[-1]["train_loss"] < steps[0]["train_loss"], steps
    assert steps[-1]["full_valid_loss"] < steps[5]["full_valid_loss"] + 1, steps
    checkpoints = list(jobs.checkpoints.list(job.id))
    assert [c.step_number for c in checkpoints] == [6], checkpoints
    assert checkpoints[0].metrics.full_valid_loss > 0, checkpoints
    rows = client.files.content(job.result_files[0]).text.splitlines()
    assert rows[0].startswith("step,train_loss,train_accuracy") and len(rows) == 13, rows
    for model in ("butler", job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint):
        answer = client.chat.completions.create(
            model=model, messages=HELLO, max_tokens=12, temperature=0
        )
        assert answer.choices[0].message.content, answer
    assert answer.model
    assert job.id in [j.id for j in jobs.list(limit=1, metadata={"team": "house"})]
    other = jobs.create(**{**order, "suffix": "other"})
    assert ended(jobs.cancel(other.id)).status == "cancelled"
    raises(openai.ConflictError, "fine_tuning_job_over", lambda: jobs.cancel(job.id))
    raises(openai.NotFoundError, "fine_tuning_job_not_found", lambda: jobs.retrieve("ftjob-1"))
    wrong = lambda: jobs.create(**{**order, "model": "nobody"})
    raises(openai.NotFoundError, "model_not_found", wrong)
    assert client.models.delete("butler").deleted
    for file in (data.id, held.id, *job.result_files):
        assert client.files.delete(file).deleted


async def asynchronous():
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0) as many:

        async def one(model):
            answer = await many.chat.completions.create(
                model=model, messages=HELLO, max_tokens=8, temperature=0
            )
            return answer.choices[0].message.content

        async def streamed(model):
            stream = await many.chat.completions.create(
                model=model, messages=HELLO, max_tokens=8, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        asked = [BASE, ADAPTER] * 4
        whole = await asyncio.gather(*[one(m) for m in asked])
        assert await asyncio.gather(*[streamed(m) for m in asked]) == whole
        assert len(set(whole)) == 2, "one answer for each model, whatever else is in the batch"
        try:
            await one("nobody")
            raise AssertionError("no NotFoundError")
        except openai.NotFoundError:
            pass
        abandoned = await many.chat.completions.create(
            model=BASE, messages=HELLO, max_tokens=1500, stream=True
        )
        async for _ in abandoned:
            break
        await abandoned.close()


if __name__ == "__main__":
    for test in (
        models,
        chat,
        streaming,
        choices_and_logprobs,
        completions,
        exceptions,
        files,
        fine_tuning,
        failing_in_mid_stream,
        rate_limited,
    ):
        test()
        print(f"python: {test.__name__} ok")
    asyncio.run(asynchronous())
    print("python: asynchronous ok")
