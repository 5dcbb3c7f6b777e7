"""OpenAI's own package, in strict mode, asks models: chat, streams, completions, log-probabilities. Prints one JSON line."""

import asyncio
import json
import sys

import openai

model = sys.argv[1]
client = openai.OpenAI(_strict_response_validation=True, max_retries=0)
turns = [{"role": "user", "content": "Write a short story about a fox."}]
whole = client.chat.completions.create(
    model=model, messages=turns, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2
)  # fmt: skip
chunks = list(
    client.chat.completions.create(
        model=model, messages=turns, temperature=0, max_completion_tokens=24, stream=True, logprobs=True,
        stream_options={"include_usage": True},
    )
)  # fmt: skip
streamed = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
seeded = [
    client.chat.completions.create(model=model, messages=turns, seed=7, max_tokens=20, n=2, stop=["\n\n"]) for _ in range(2)
]
parts = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Tell me of a cat."}]},
]
of_parts = client.chat.completions.create(model=model, messages=parts, max_tokens=5)
# the first token of an echoed prompt has no log-probability: null, as OpenAI answers and its own types do not foresee
lenient = openai.OpenAI(max_retries=0)
legacy = lenient.completions.create(
    model=model, prompt=["Once upon a time", "The dog"], max_tokens=6, temperature=0, logprobs=2, echo=True
)
own = client.completions.create(model=model, prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=0)
assert len(own.choices[0].logprobs.token_logprobs) == 6
of_ids = client.completions.create(model=model, prompt=[523, 614, 261, 448], max_tokens=6, temperature=0)
# chunks before the last have finish_reason null, which OpenAI sends and its own types do not foresee either
legacy_stream = list(lenient.completions.create(model=model, prompt="Once upon a time", max_tokens=6, temperature=0, stream=True))


async def together(count):
    """The same question many times at once, and half of them hung up on."""
    many = openai.AsyncOpenAI(_strict_response_validation=True, max_retries=0)

    async def one(number):
        stream = await many.chat.completions.create(model=model, messages=turns, temperature=0, max_tokens=24, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if number % 2 and len(text) > 10:
                await stream.close()
                return None
        return text

    return await asyncio.gather(*(one(number) for number in range(count)))


refused = {}
for name, options in {
    "long": {"messages": [{"role": "user", "content": "a fox " * 600}]},
    "image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
    "hot": {"temperature": 3},
    "json": {"response_format": {"type": "json_object"}},
    "top": {"top_logprobs": 3},
    "unknown": {"model": "nobody"},
}.items():
    try:
        client.chat.completions.create(**{"model": model, "messages": turns, **options})
    except openai.APIStatusError as error:
        refused[name] = [error.status_code, error.type, error.param, error.code]
print(
    json.dumps(
        {
            "whole": whole.to_dict(),
            "streamed": streamed,
            "stream_usage": chunks[-1].usage.to_dict(),
            "stream_tokens": [
                token.token for c in chunks for ch in c.choices for token in (ch.logprobs.content if ch.logprobs else [])
            ],
            "seeded": [[choice.message.content for choice in one.choices] for one in seeded],
            "parts": of_parts.choices[0].message.content,
            "legacy": legacy.to_dict(),
            "of_ids": of_ids.choices[0].text,
            "legacy_stream": "".join(chunk.choices[0].text for chunk in legacy_stream),
            "together": asyncio.run(together(12)),
            "refused": refused,
        }
    )
)
