"""Writes the golden files: what Hugging Face transformers computes.

Run it with any Python that has torch, transformers, accelerate and gguf:

  python tests/golden/make.py --model=PATH/SmolLM2-135M-Instruct.Q4_1.gguf

Each file holds the logits of 64 positions in 512 columns (float32 on the CPU,
kept as 16-bit steps) and the versions that made them. No file holds weights:
those of the random models come from seeds (families.py).
"""

import argparse
import pathlib
import sys
import tempfile

import families
import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

HERE = pathlib.Path(__file__).parent
TEXT = HERE.parent.parent / 'LICENSE'
LENGTH, NEW = 1000, 64


def save(name, arrays):
  """One file, with the versions of what made it."""
  versions = (
    f'python {sys.version.split()[0]}, torch {torch.__version__}, '
    f'transformers {transformers.__version__}, numpy {np.__version__}'
  )
  path = HERE / f'{name}.npz'
  np.savez_compressed(path, versions=np.array(versions), **arrays)
  print(path.name, path.stat().st_size, 'bytes', f'std {arrays["std"]:.3f}')


def run(model, tokens):
  """Logits of every position, float32 [T V]."""
  with torch.inference_mode():
    return model(torch.as_tensor(tokens)[None]).logits[0].float().numpy()


def random_family(name, raw):
  """Logits of a small random model."""
  fields = dict(raw)
  kind = transformers.CONFIG_MAPPING[fields.pop('model_type')]
  config = kind(**fields)
  config._attn_implementation = 'eager'
  model = getattr(transformers, raw['architectures'][0])(config).eval()
  tied = raw['tie_word_embeddings']
  state = {
    key: torch.from_numpy(families.weight(key, tuple(value.shape)))
    for key, value in model.state_dict().items()
    if not (tied and key == 'lm_head.weight')
  }
  missing, unexpected = model.load_state_dict(state, strict=False)
  assert not unexpected and set(missing) <= {'lm_head.weight'}, missing
  model.tie_weights()
  logits = run(model.float(), families.tokens(name, raw))
  rows, columns, kept = families.sample(logits)
  save(name, {'rows': rows, 'columns': columns, **families.pack(kept)})


def load_gguf(path):
  """transformers' own import of a GGUF file, in float32."""
  path = pathlib.Path(path).resolve()
  with tempfile.TemporaryDirectory() as cache:
    model = transformers.AutoModelForCausalLM.from_pretrained(
      path.parent, gguf_file=path.name, dtype=torch.float32, cache_dir=cache
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
      path.parent, gguf_file=path.name, cache_dir=cache
    )
  # transformers takes GPT-2's split for every gpt2 tokenizer of a GGUF file;
  # the model was trained with single digits ('smollm' in llama.cpp).
  tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  return model.eval(), tokenizer


def greedy(model, tokens):
  """The likeliest 64 tokens, and the smallest lead of a first over a second."""
  out, lead, past = [], float('inf'), None
  step = torch.as_tensor(tokens)[None]
  with torch.inference_mode():
    for _ in range(NEW):
      result = model(step, past_key_values=past, use_cache=True)
      past = result.past_key_values
      best = result.logits[0, -1].float().topk(2)
      lead = min(lead, float(best.values[0] - best.values[1]))
      out.append(int(best.indices[0]))
      step = best.indices[:1][None]
  return np.array(out), lead


def real(path):
  """SmolLM2 over the first tokens of the licence, and its continuation."""
  model, tokenizer = load_gguf(path)
  text = TEXT.read_text('utf-8')
  tokens = tokenizer(text, add_special_tokens=False)['input_ids'][:LENGTH]
  rows, columns, kept = families.sample(run(model, tokens))
  new, lead = greedy(model, tokens)
  print(repr(tokenizer.decode(new)), f'smallest lead {lead:.4f}')
  arrays = {'rows': rows, 'columns': columns, **families.pack(kept)}
  ids = {'tokens': np.array(tokens, np.int32), 'greedy': new.astype(np.int32)}
  save('smollm2_135m_q4_1', {**arrays, **ids, 'lead': np.float64(lead)})


def main():
  """Writes every golden file."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', help='SmolLM2-135M-Instruct.Q4_1.gguf')
  args = parser.parse_args()
  for name, raw in families.FAMILIES.items():
    random_family(name, raw)
  if args.model:
    real(args.model)


if __name__ == '__main__':
  main()
