"""Time and memory against transformers' DeepSeek-V4 with the same weights: `python tests/compare_peer.py [--quick]`.

Each measurement runs in a process of its own, all with the same threads and allocator settings, the sides taking turns.
"one shot" is one call over the whole sequence, "chunked" feeds transformers 512 tokens at a time through its cache,
which also carries gradients: the best way to use it. A training step is forward, loss and backward; ours is measured
with the whole objective (language model, balance, indexer), and with the language-model loss alone, which is all that
transformers computes. Decoding is measured with both models in one process, which take turns every 16 tokens: the
median token of each, after a context of T. `--train-loop` is training itself: all sides in one process, the same rows,
AdamW and clipping, a step of each in turn; the median step by the clock and by the processor's time.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]
CHUNK = 512
ALL = ("ours", "peer", "chunked")
LOOP_SIDES, LOOP_LENGTH = (*ALL, "ours-lm"), 2048
BURSTS, BURST = 12, 16  # turns of each side, tokens of a turn
CONTEXTS = (1024, 32768)
# with --keep-memory freed memory is kept instead of given back: about half of the peer's one-shot time is page faults
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
PLAN = {
    "forward": {2048: ALL, 4096: ALL, 8192: ("ours", "chunked"), 16384: ("ours", "chunked")},
    "train": {4096: (*ALL, "ours-lm"), 8192: ("ours", "chunked", "ours-lm"), 16384: ("ours", "ours-lm")},
}  # fmt: skip


def resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def load(side: str, folder: str):
    if side.startswith("ours"):
        from abyssal.model import load_pretrained

        return load_pretrained(folder)
    from transformers import DeepseekV4ForCausalLM

    return DeepseekV4ForCausalLM.from_pretrained(
        folder, experts_implementation="grouped_mm", attn_implementation="eager"
    )


def run(model, side: str, task: str, ids, targets) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    learn = task == "train"
    with torch.set_grad_enabled(learn):
        if side == "ours" and learn:
            model(ids, targets=targets).loss.backward()
            return
        if side == "chunked":
            from transformers import DynamicCache

            cache, loss = DynamicCache(config=model.config), 0.0
            for part, wanted in zip(ids.split(CHUNK, 1), targets.split(CHUNK, 1)):
                logits = model(part, past_key_values=cache, use_cache=True).logits
                if learn:
                    loss = loss + cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
            loss = loss / ids.shape[1]
        else:
            logits = model(ids).logits if side.startswith("ours") else model(ids, use_cache=False).logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten()) if learn else None
        if learn:
            loss.backward()


def measure(side: str, task: str, t: int, folder: str, threads: int, repeats: int) -> None:
    import torch

    torch.set_num_threads(threads)
    model = load(side, folder)
    ids = torch.randint(0, 512, (1, t), generator=torch.Generator().manual_seed(t))
    targets = ids.roll(-1, 1)
    run(model, side, task, ids[:, :64], targets[:, :64])
    model.zero_grad(set_to_none=True)
    before, times = resident(), []
    for _ in range(repeats):
        started = time.perf_counter()
        run(model, side, task, ids, targets)
        times.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": min(times), "gib": (peak - before) / 2**30}))


def measure_decode(t: int, folder: str, threads: int) -> None:
    import torch
    from transformers import DynamicCache

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    ours, peer = load("ours", folder).eval(), load("peer", folder).eval()
    ids = torch.randint(0, 512, (1, t + BURSTS * BURST), generator=torch.Generator().manual_seed(t))
    ours_cache = ours.new_cache(1, ids.shape[1])
    peer_cache = DynamicCache(config=peer.config)
    calls = {
        "ours": lambda x: ours(x, cache=ours_cache, logits_to_keep=1).logits,
        "peer": lambda x: peer(x, past_key_values=peer_cache, use_cache=True, logits_to_keep=1).logits,
    }
    for part in ids[:, :t].split(CHUNK, 1):
        for call in calls.values():
            call(part)
    times: dict[str, list[float]] = {side: [] for side in calls}
    logits: dict[str, list] = {side: [] for side in calls}
    for burst in ids[:, t:].split(BURST, 1):
        for side, call in calls.items():
            for token in burst.split(1, 1):
                started = time.perf_counter()
                logits[side].append(call(token))
                times[side].append(time.perf_counter() - started)
    found = {side: {"median_ms": 1e3 * sorted(x)[len(x) // 2], "min_ms": 1e3 * min(x)} for side, x in times.items()}
    best = [torch.cat(side).argmax(-1) for side in logits.values()]
    print(json.dumps({**found, "same_argmax": (best[0] == best[1]).float().mean().item()}))


def measure_loop(t: int, folder: str, threads: int, repeats: int) -> None:
    import torch

    torch.set_num_threads(threads)
    models = {side: load(side, folder).train() for side in LOOP_SIDES}
    optimizers = {side: torch.optim.AdamW(model.parameters(), lr=1e-4) for side, model in models.items()}
    rows = torch.randint(0, 512, (repeats + 1, 1, t), generator=torch.Generator().manual_seed(t))
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in LOOP_SIDES}
    for row in rows:
        for side, model in models.items():
            clock, work = time.perf_counter(), time.process_time()
            optimizers[side].zero_grad(set_to_none=True)
            run(model, side, "train", row, row.roll(-1, 1))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers[side].step()
            times[side].append((time.perf_counter() - clock, time.process_time() - work))
    found = {}
    for side, measured in times.items():
        clock, work = (sorted(column)[repeats // 2] for column in zip(*measured[1:]))
        found[side] = {"seconds": clock, "tokens_per_second": t / clock, "processor_seconds": work}
    print(json.dumps(found))


def loop_row(folder: str, threads: int, repeats: int) -> dict:
    found = child("all", "loop", LOOP_LENGTH, folder, threads, repeats)
    row = {"task": "train-loop", "T": LOOP_LENGTH, **found}
    if "error" in found:
        print(f"train-loop T={LOOP_LENGTH} {found['error']}", flush=True)
        return row
    ours = found["ours"]
    for side, x in found.items():
        clock, work = (x[key] / ours[key] for key in ("seconds", "processor_seconds"))
        print(
            f"train-loop T={LOOP_LENGTH} {side:8s} {x['tokens_per_second']:8,.0f} tokens/s   {x['seconds']:.2f} s, "
            f"{x['processor_seconds']:.2f} s of processors a step   ours faster: {clock:.1f} x ({work:.1f} x)",
            flush=True,
        )
    return row


def decode_row(t: int, folder: str, threads: int) -> dict:
    found = child("both", "decode", t, folder, threads, 1)
    if "error" in found:
        print(f"decode   T={t:<6d} {found['error']}", flush=True)
        return {"task": "decode", "T": t, **found}
    ours, peer = found["ours"], found["peer"]
    print(
        f"decode   T={t:<6d} ours {ours['median_ms']:.1f} ms | peer {peer['median_ms']:.1f} ms a token   "
        f"ours faster: {peer['median_ms'] / ours['median_ms']:.1f} x peer ({peer['min_ms'] / ours['min_ms']:.1f} x by "
        f"the fastest tokens); same best token at {found['same_argmax']:.0%}",
        flush=True,
    )
    return {"task": "decode", "T": t, **found}


def child(side: str, task: str, t: int, folder: str, threads: int, repeats: int) -> dict:
    command = [sys.executable, __file__, "--child", side, task, str(t), folder, str(threads), str(repeats)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="T = 2048 and 4096 only")
    parser.add_argument("--decode", action="store_true", help="decoding only")
    parser.add_argument("--train-loop", action="store_true", help=f"training steps at T = {LOOP_LENGTH} only")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process (default 2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the fastest counts (default 3)")
    parser.add_argument("--keep-memory", action="store_true", help="let the allocator keep freed memory (default: off)")
    parser.add_argument("--out", type=Path, help="write the numbers to this JSON file")
    args = parser.parse_args()
    os.environ |= KEEP_MEMORY if args.keep_memory else {}
    from peer import make_peer, peer_config

    with tempfile.TemporaryDirectory() as folder:
        make_peer(peer_config()).save_pretrained(folder)
        rows = []
        if args.train_loop:
            rows.append(loop_row(folder, args.threads, args.repeats))
        for task, sizes in PLAN.items():
            for t, sides in sizes.items():
                if args.decode or args.train_loop or (args.quick and t > 4096):
                    continue
                found = {side: child(side, task, t, folder, args.threads, args.repeats) for side in sides}
                rows.append({"task": task, "T": t, **found})
                print(line(task, t, found), flush=True)
        if not args.train_loop:
            rows += [decode_row(t, folder, args.threads) for t in CONTEXTS]
    if args.out:
        args.out.write_text(json.dumps({**provenance(args), "rows": rows}, indent=1) + "\n")


def line(task: str, t: int, found: dict) -> str:
    ours = found["ours"].get("seconds", float("nan"))
    cells = [
        f"{side} {x['seconds']:.2f} s {x['gib']:.2f} GiB" if "seconds" in x else f"{side} {x['error']}"
        for side, x in found.items()
    ]
    ratios = [
        f"{x['seconds'] / ours:.1f} x {side}"
        for side, x in found.items()
        if "seconds" in x and not side.startswith("ours")
    ]
    return f"{task:8s} T={t:<6d} " + " | ".join(cells) + (f"   ours faster: {', '.join(ratios)}" if ratios else "")


def provenance(args: argparse.Namespace) -> dict:
    import platform

    import torch
    import transformers

    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "keep_memory": args.keep_memory,
    }


if __name__ == "__main__":
    if "--child" in sys.argv:
        side, task, t, folder, threads, repeats = sys.argv[sys.argv.index("--child") + 1 :]
        if task == "decode":
            measure_decode(int(t), folder, int(threads))
        elif task == "loop":
            measure_loop(int(t), folder, int(threads), int(repeats))
        else:
            measure(side, task, int(t), folder, int(threads), int(repeats))
    else:
        main()
