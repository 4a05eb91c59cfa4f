"""Run in a process of its own: load everything a checkpoint holds, use it once, save it again.

    python use_checkpoint.py SOURCE OUTPUT installed|remote [REVISION]

`installed` imports our package and gives no flag; `remote` trusts the checkpoint's own code. Results go to OUTPUT.pt,
what is saved again into the folder OUTPUT. The last line printed is a JSON report, which also counts prompts to a user.
"""

import builtins
import json
import sys
from typing import NoReturn

import numpy as np
import torch
from PIL import Image

source, output, code, *revision = sys.argv[1:]
prompts = []


def nobody_answers(question: str = "") -> NoReturn:
    prompts.append(question)
    raise EOFError(question)


builtins.input = nobody_answers
options = {"revision": revision[0]} if revision else {}
if code == "installed":
    import transformers_worldvla  # noqa: F401
else:
    options["trust_remote_code"] = True

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer  # noqa: E402
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # noqa: E402

autos = (AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer, AutoImageProcessor)
loaded = {auto.__name__: auto.from_pretrained(source, **options) for auto in autos}
model, processor = loaded["AutoModelForCausalLM"], loaded["AutoProcessor"]

picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
inputs = processor(images=[picture, picture], instruction="pick up the cup")
with torch.no_grad():
    logits = {name: loaded[name](**inputs).logits for name in ("AutoModel", "AutoModelForCausalLM")}
tokens = model.generate_actions(**inputs, num_actions=2)
actions = torch.from_numpy(processor.decode_actions(tokens))
torch.save({"inputs": dict(inputs), "logits": logits, "tokens": tokens, "actions": actions}, f"{output}.pt")

for part in (model, processor):
    part.save_pretrained(output)
classes = {name: f"{type(value).__module__}.{type(value).__name__}" for name, value in loaded.items()}
print(json.dumps({"classes": classes, "prompts": len(prompts)}))
