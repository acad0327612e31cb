"""Does preparing and scoring a text take more memory for a longer one?

    python tests/soak/text_memory.py --megabytes=100,400,2000 [--unit=words]

For each unit a process prepares a text of a few kilobytes and a large one and reads the
large one as `evaluate --text` does; printed are the peak resident size above that of
the small text, and MB/s from the source to the shards. Exit code 1 if any peak is more
than --limit above.
"""

import argparse
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

UNITS = ("bytes", "chars", "words", "sentencepiece", "tokenizers")


def write(path: pathlib.Path, megabytes: float, *, words: int = 50_000) -> None:
    """Lines of words, the rarer the longer, some of them in other scripts."""
    draw = random.Random(7)
    letters = "etaoinshrdlucmfwypvbgk\u00e9\u65e5"
    known = [
        "".join(draw.choices(letters, k=1 + int(i**0.2) + draw.randrange(4)))
        for i in range(words)
    ]
    weights = [1 / (i + 3) for i in range(words)]
    size = 0
    with path.open("wb") as file:
        while size < megabytes * 1e6:
            drawn = draw.choices(known, weights, k=20_000)
            lines = (" ".join(drawn[i : i + 17]) for i in range(0, len(drawn), 17))
            block = ("\n".join(lines) + "\n").encode()
            size += file.write(block)


def tokenizer(unit: str, folder: pathlib.Path) -> str:
    """A tokenizer of 8,000 pieces that was trained on a text like these."""
    sample = folder / "sample.txt"
    if not sample.exists():
        write(sample, 2)
    path = folder / f"{unit}.model"
    if path.exists():
        return str(path)
    if unit == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            input=str(sample),
            model_prefix=str(folder / unit),
            vocab_size=8000,
            minloglevel=9,
            hard_vocab_limit=False,
        )
    else:
        import tokenizers

        model = tokenizers.ByteLevelBPETokenizer()
        model.train([str(sample)], vocab_size=8000, show_progress=False)
        model.save(str(path))
    return str(path)


def measure(unit: str, path: str, model: str) -> None:
    """What one process does; prints its peak resident size and MB/s."""
    from xlformer import config, prepare
    from xlformer.scoring import results, texts, units

    data = config.default_config().data
    data.update(corpus="text", path=path, tokenizer=model)
    data.unit = "bytes" if model else unit
    with tempfile.TemporaryDirectory(dir=pathlib.Path(path).parent) as folder:
        begin = time.perf_counter()
        found = prepare.prepare(data, directory=folder)
        seconds = time.perf_counter() - begin
        tokens, _, facts = texts.own_text(found.vocabulary, path)
        results.unigram_entropy(tokens, found.vocabulary.size)
        units.scored(
            found.vocabulary,
            tokens,
            [(1, len(tokens))],
            units.Count(facts["bytes"], facts["words"]),
            lines="<eos>" in facts["words_are"],
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(peak, pathlib.Path(path).stat().st_size / 1e6 / seconds)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", default="100,400")
    parser.add_argument("--unit", choices=UNITS)
    parser.add_argument("--limit", type=float, default=400, help="MiB")
    parser.add_argument("--folder", help="where texts are kept between runs")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*args.measure)
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary)
        sizes = [float(size) for size in args.megabytes.split(",")]
        for unit in [args.unit] if args.unit else UNITS:
            model = "" if unit in UNITS[:3] else tokenizer(unit, folder)
            base = 0.0
            for size in [0.05, *sizes]:
                path = folder / f"{size:g}.txt"
                if not path.exists():
                    write(path, size)
                command = [sys.executable, __file__, "--measure", unit, str(path)]
                run = subprocess.run([*command, model], stdout=subprocess.PIPE)
                assert run.returncode == 0
                peak, rate = map(float, run.stdout.split())
                base = base or peak
                worst = max(worst, peak - base)
                line = f"{peak:6.0f} MiB, {peak - base:+5.0f}, {rate:6.1f} MB/s"
                print(f"{unit:14} {size:7g} MB  {line}", flush=True)
    return int(worst > args.limit)


if __name__ == "__main__":
    sys.exit(main())
