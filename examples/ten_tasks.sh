#!/usr/bin/env bash
# Ten things that people do with a model of their own, one command or a few lines of Python each, with the seconds they take:
#
#   bash examples/ten_tasks.sh [FOLDER]           needs pip install 'abyssal[plot,serve,hf]'
#
# TEXT=~/notes trains on your text instead of a part of Python's library. SMALL=1 takes as few steps as make a run.
set -euo pipefail
examples=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-ten-tasks}" && cd "${1:-ten-tasks}"
python=${PYTHON:-python}
abyssal() { "$python" -m abyssal "$@"; }
TEXT=${TEXT:-$("$python" -c 'import email, os; print(os.path.dirname(email.__file__))')}
few() { [ -z "${SMALL:-}" ] || printf ' --set %s' train.steps=2 data.sequence_length=64 data.batch_size=2 data.held_out_rows=2 "$@"; }
task() { seconds=$SECONDS; printf '\n== %s\n' "$*"; }
done_in() { printf '== %d s\n' $((SECONDS - seconds)); }

task 1. Train on your own text
# shellcheck disable=SC2046
abyssal train toy --set data.source="$TEXT" --set train.minutes=2 $(few) --out runs/own
done_in

task 2. Open it in Python
"$python" - <<'PYTHON'
from abyssal.model import generate, load_pretrained

model = load_pretrained("runs/own")
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(model.layers)} layers")
print(bytes(t for t in generate(model, [256, *b"import "], max_new_tokens=40, temperature=0) if t < 256))
PYTHON
done_in

task 3. Fine-tune it on 50 conversations of your own
"$python" - <<'PYTHON'
import json

with open("mine.jsonl", "w", encoding="utf-8") as file:
    for n in range(50):
        said = [{"role": "user", "content": f"What follows {n}?"}, {"role": "assistant", "content": str(n + 1)}]
        file.write(json.dumps({"messages": said}) + "\n")
PYTHON
# shellcheck disable=SC2046
abyssal train sft --set data.source=mine.jsonl --set train.init=runs/own --set train.minutes=1 $(few data.sequence_length=128) --out runs/chat
done_in

export PORT=${PORT:-8765}
task 4. Talk to it, and serve it
echo 'What follows 7?' | abyssal chat runs/chat --max-new-tokens 8 --temperature 0
abyssal serve runs/chat --port "$PORT" > serve.log 2>&1 &
server=$!
trap 'kill "$server" 2> /dev/null || true' EXIT
"$python" - <<'PYTHON'
import json, os, time, urllib.error, urllib.request

asked = {"model": "chat", "max_tokens": 8, "temperature": 0, "messages": [{"role": "user", "content": "What follows 7?"}]}
request = urllib.request.Request(
    f"http://127.0.0.1:{os.environ['PORT']}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
)
for _ in range(120):
    try:
        print(json.load(urllib.request.urlopen(request))["choices"][0]["message"])
        break
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ConnectionRefusedError):
            raise
        time.sleep(0.5)
else:
    raise SystemExit("the endpoint did not come up: see serve.log")
PYTHON
kill "$server" && wait "$server" || true
done_in

task 5. Export it, and let transformers write the same tokens
abyssal convert runs/own exported
"$python" - <<'PYTHON'
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import abyssal.hf  # transformers has no Engram: this brings ours
from abyssal.model import generate, load_pretrained

tokenizer, theirs = AutoTokenizer.from_pretrained("exported"), AutoModelForCausalLM.from_pretrained("exported")
ids = tokenizer("def ", return_tensors="pt").input_ids
written = theirs.generate(ids, max_new_tokens=30, do_sample=False)[0, ids.shape[1] :].tolist()
ours = list(generate(load_pretrained("runs/own"), ids, max_new_tokens=len(written), temperature=0))
assert written == ours, (written, ours)
print(tokenizer.decode(written))
PYTHON
done_in

task 6. Fine-tune a checkpoint that transformers made
"$python" - <<'PYTHON'
from transformers import AutoTokenizer, DeepseekV4Config, DeepseekV4ForCausalLM

import abyssal.hf

config = DeepseekV4Config(
    vocab_size=288, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, head_dim=32, q_lora_rank=32, o_groups=1,
    o_lora_rank=32, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, sliding_window=32,
    index_n_heads=2, index_head_dim=32, index_topk=16, max_position_embeddings=2048, num_nextn_predict_layers=0,
    layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
    mlp_layer_types=["moe", "moe", "moe"], bos_token_id=256, eos_token_id=257, pad_token_id=258,
)  # fmt: skip
DeepseekV4ForCausalLM(config).save_pretrained("theirs")
AutoTokenizer.from_pretrained("exported").save_pretrained("theirs")
PYTHON
# shellcheck disable=SC2046
abyssal train finetune --set data.source="$TEXT" --set train.init=theirs --set train.minutes=1 $(few) --out runs/theirs
abyssal generate runs/theirs --prompt 'import ' --max-new-tokens 20
done_in

task 7. Lay two runs over each other
abyssal plot runs/own runs/theirs --by tokens --out compare.png
done_in

task 8. Train a task of your own
# shellcheck disable=SC2046
abyssal train "$examples/own_task.toml" --set data.source="planted:$examples/own_task.py:Brackets" $(few) --out runs/task
abyssal eval runs/task --trust-code
done_in

task 9. Ask whether a mechanism of your own does better
# shellcheck disable=SC2046
abyssal ablate "$examples/own_suite.py" --seeds 2 $(few) --out runs/ablate
done_in

task 10. What a configuration of your own costs
cat > mine.toml <<'TOML'
base = "toy"
[model]
num_hidden_layers = 8
compress_ratios = [0, 4, 32, 4, 32, 4, 32, 4]
engram = "none"
TOML
abyssal info mine.toml --gpu rtx4090 --tokens 1e9
done_in
