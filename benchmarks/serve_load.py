"""Load on `minigpt3d serve`: one client, then many at once, with OpenAI's client on loopback.

Each request holds a held-out object of the bundled model as a `data:` URL and the question "What is this?". One client asks one by
one, about every object; its answers are what the others' are compared with. Then all clients ask at once, each one request after
the other, in several rounds. Memory is that of the server with its reading processes.

    python benchmarks/serve_load.py [--clients 32] [--requests 20] [--rounds 3] [--batch-size N]
"""

import argparse
import asyncio
import base64
import io
import re
import subprocess
import sys
import time
import urllib.request

import numpy as np
import openai
import psutil

from minigpt3d.arguments import positive_int
from minigpt3d.evaluation.objects import read_household
from minigpt3d.processing_minigpt3d import DEFAULT_PROMPT


def start_server(arguments: list[str]) -> tuple[subprocess.Popen, str]:
    """The process and its address, when it answers."""
    command = [sys.executable, "-m", "minigpt3d.cli", "serve", "--port", "0", "--device", "cpu", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    return process, line.split()[-1]


def data_url(cloud: np.ndarray) -> str:
    """(N, 6) → URL."""
    stream = io.BytesIO()
    np.save(stream, cloud)
    return f"data:;name=cloud.npy;base64,{base64.b64encode(stream.getvalue()).decode()}"


def memory(process: subprocess.Popen) -> float:
    """MB of a process and its children."""
    root = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in (root, *root.children(recursive=True))) / 1e6


def batches(address: str) -> np.ndarray:
    """Number of batches and of questions in them, so far."""
    text = urllib.request.urlopen(f"{address.removesuffix('/v1')}/metrics").read().decode()
    return np.array(
        [float(re.search(rf"^minigpt3d_batch_size_{name} (\S+)", text, re.M)[1]) for name in ("count", "sum")]
    )


async def ask_all(
    address: str, clouds: list[str], shares: list[list[int]]
) -> tuple[list[list[str]], np.ndarray, float]:
    """Each client asks about its share of the objects, one after the other.

    Returns:
        Answers in the order of the shares, seconds of each request, seconds of all.
    """
    times: list[float] = []
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:

        async def ask(share: list[int]) -> list[str]:
            answers = []
            for number in share:
                content = [{"type": "point_cloud_url", "point_cloud_url": {"url": clouds[number]}}]
                content.append({"type": "text", "text": DEFAULT_PROMPT})
                start = time.perf_counter()
                answer = await client.chat.completions.create(
                    model="household", messages=[{"role": "user", "content": content}]
                )
                times.append(time.perf_counter() - start)
                answers.append(answer.choices[0].message.content)
            return answers

        start = time.perf_counter()
        answers = await asyncio.gather(*map(ask, shares))
        return answers, np.array(times), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=positive_int, default=32)
    parser.add_argument("--requests", type=positive_int, default=20, help="of each client")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--batch-size", type=positive_int, help="of the server; by default its own")
    arguments = parser.parse_args()
    clouds = [data_url(item.read()) for item in read_household()]
    size = ["--batch-size", str(arguments.batch_size)] if arguments.batch_size else []
    process, address = start_server(size)
    try:
        everything = list(range(len(clouds)))
        asyncio.run(ask_all(address, clouds, [everything[:10]]))  # warm-up
        print("clients  requests/s  p50 s  p95 s  batch  other answers  MB")
        rate, num_others = 0.0, 0
        rng = np.random.default_rng(0)
        for number in range(arguments.rounds + 1):
            shares = [everything]
            if number:
                shares = rng.integers(len(clouds), size=(arguments.clients, arguments.requests)).tolist()
            before = batches(address)
            answers, times, seconds = asyncio.run(ask_all(address, clouds, shares))
            count, questions = batches(address) - before
            if not number:
                (expected,), rate = answers, len(times) / seconds
            others = sum(
                answer != expected[item]
                for share, texts in zip(shares, answers, strict=True)
                for item, answer in zip(share, texts, strict=True)
            )
            num_others += others
            p50, p95 = np.quantile(times, [0.5, 0.95])
            print(
                f"{len(shares):7}{len(times) / seconds:12.1f}{p50:7.2f}{p95:7.2f}{questions / count:7.1f}{others:15}"
                f"{memory(process):4.0f}   {len(times) / seconds / rate:.1f} times one by one",
                flush=True,
            )
    finally:
        process.terminate()
        process.wait(60)
    if num_others:
        sys.exit(f"{num_others} answers differ from those to the same questions one by one.")


if __name__ == "__main__":
    main()
