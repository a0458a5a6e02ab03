"""llama.cpp through llama-cpp-python, Q4_0 in every matrix.

python llamacpp_peer.py convert CHECKPOINT FOLDER     # needs the package gguf
python llamacpp_peer.py serve FOLDER THREADS
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from protocol import MAX_BATCH_CONTEXT, MAX_CONTEXT, StepRuntime, serve

FILE = "model.gguf"
PROMPT_BATCH = 2048  # tokens of one llama_decode; computed 512 at a time, llama.cpp's default


def convert(checkpoint: Path, folder: Path) -> None:
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    arch = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(folder / FILE, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if arch == "llama":
        writer.add_rope_dimension_count(config["head_dim"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    _add_tokenizer(writer, checkpoint, gguf)
    archs = {"qwen2": gguf.MODEL_ARCH.QWEN2, "llama": gguf.MODEL_ARCH.LLAMA}
    names = gguf.get_tensor_name_map(archs[arch], config["num_hidden_layers"])
    for name, tensor in _tensors(checkpoint / "model.safetensors"):
        values = tensor.astype(np.float32)
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbours in a head, checkpoints rotate its halves.
            rows = heads if name.endswith("q_proj.weight") else kv_heads
            halves = values.reshape(rows, 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if values.ndim == 1:
            writer.add_tensor(target, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, checkpoint: Path, gguf: Any) -> None:
    content = json.loads((checkpoint / "tokenizer.json").read_text())
    vocab = list(content["model"]["vocab"])  # in the order of their numbers
    special = [token["content"] for token in content["added_tokens"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(vocab + special)
    kinds = gguf.TokenType
    writer.add_token_types([kinds.NORMAL] * len(vocab) + [kinds.CONTROL] * len(special))
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(len(vocab))
    writer.add_eos_token_id(len(vocab) + 1)


def _tensors(path: Path):
    """Names and float16 arrays of a safetensors file."""
    data = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8 : 8 + length].tobytes())
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, data[start:end].view(np.float16).reshape(entry["shape"])


class LlamaCpp(StepRuntime):
    """One context for a single sequence and, when first needed, one for a batch."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__()
        import llama_cpp

        self.api, self.threads = llama_cpp, threads
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(folder / FILE).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp doesn't load {folder / FILE}")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(PROMPT_BATCH, 0, 1)
        self._contexts: dict[int, Any] = {}
        self.context = self._context(1)
        self.length = self.sequences = 0

    def prefill(self, ids: np.ndarray) -> None:
        self.forget()
        self._start(1)
        self._prompt(0, ids)
        self._best(-1)

    def prepare(self, ids: np.ndarray) -> None:
        self.sequences, self.length = ids.shape
        self._start(self.sequences)
        for i, prompt in enumerate(ids):
            self._prompt(i, prompt)

    def rewind(self) -> None:
        memory = self.api.llama_get_memory(self.context)
        for i in range(self.sequences):
            self.api.llama_memory_seq_rm(memory, i, self.length, -1)
        self.position = self.length

    def step(self, ids: np.ndarray) -> np.ndarray:
        self._decode([(int(t), self.position, i, True) for i, t in enumerate(ids)])
        self.position += 1
        return np.array([self._best(i) for i in range(len(ids))])

    def _context(self, sequences: int) -> Any:
        if sequences not in self._contexts:
            params = self.api.llama_context_default_params()
            params.n_ctx = MAX_CONTEXT if sequences == 1 else sequences * MAX_BATCH_CONTEXT
            params.n_batch = PROMPT_BATCH
            params.n_seq_max = sequences
            params.n_threads = params.n_threads_batch = self.threads
            self._contexts[sequences] = self.api.llama_init_from_model(self.model, params)
        return self._contexts[sequences]

    def _start(self, sequences: int) -> None:
        self.context = self._context(sequences)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def _prompt(self, sequence: int, ids: np.ndarray) -> None:
        for start in range(0, len(ids), PROMPT_BATCH):
            part = ids[start : start + PROMPT_BATCH]
            last = len(ids) - 1
            self._decode(
                [(int(t), start + i, sequence, start + i == last) for i, t in enumerate(part)]
            )

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        status = self.api.llama_decode(self.context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _best(self, row: int) -> int:
        logits = self.api.llama_get_logits_ith(self.context, row)
        return int(np.argmax(np.ctypeslib.as_array(logits, (self.vocab,))))


def load(folder: Path, threads: int):
    runtime = LlamaCpp(folder, threads)
    import llama_cpp

    model = runtime.model
    kv_heads, head_dim = (
        llama_cpp.llama_model_n_head_kv(model),
        (llama_cpp.llama_model_n_embd(model) // llama_cpp.llama_model_n_head(model)),
    )
    about = {
        "version": f"llama-cpp-python {llama_cpp.__version__}",
        "format": "Q4_0",
        "weight_bytes": llama_cpp.llama_model_size(model),
        "kv_bytes_per_token": 2 * llama_cpp.llama_model_n_layer(model) * kv_heads * head_dim * 2,
    }
    return runtime, runtime.vocab, about


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(lambda: load(Path(sys.argv[2]), int(sys.argv[3])))
