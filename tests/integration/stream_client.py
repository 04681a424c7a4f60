"""Streams one completion with the openai client; prints its text and its longest gap as JSON."""

from __future__ import annotations

import json
import sys
import time

import openai


def main() -> None:
    url, model, prompt, max_tokens = sys.argv[1:]
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    texts, gap_s, last_s = [], 0.0, None
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=int(max_tokens), temperature=0, stream=True
    )
    for chunk in stream:
        now_s = time.monotonic()
        if last_s is not None:
            gap_s = max(gap_s, now_s - last_s)
        last_s = now_s
        texts.append(chunk.choices[0].text)
        if len(texts) == 5:
            print("streaming", flush=True)
    print(json.dumps({"text": "".join(texts), "gap_s": gap_s}), flush=True)


if __name__ == "__main__":
    main()
