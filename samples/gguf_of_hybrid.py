"""Writes a GGUF file from a hybrid checkpoint of random weights, to benchmark llama.cpp on the same shape.

    python samples/gguf_of_hybrid.py out/qwen out/qwen-Q8_0.gguf --llama-cpp llama.cpp

Runs `convert_hf_to_gguf.py` of llama.cpp's sources, which knows the shapes. It takes only tokenizers that it has seen:
this one is called `gpt-2` and has a made-up merge. Such a file is good for speed only. Matrices are Q8_0.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from new_path import new_path


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file of a hybrid checkpoint, to time llama.cpp with.")
    parser.add_argument("checkpoint", type=Path, help="made by samples/make_hybrid.py")
    parser.add_argument("output", type=Path)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp's sources")
    args = parser.parse_args()
    sys.path[:0] = [str(args.llama_cpp / "gguf-py"), str(args.llama_cpp)]
    import gguf
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    gguf.SpecialVocab.add_to_gguf = lambda _, writer, quiet=False: writer.add_token_merges(["a b"])
    script = args.llama_cpp / "convert_hf_to_gguf.py"
    sys.argv = [str(script), str(args.checkpoint), "--outfile", str(new_path(args.output)), "--outtype", "q8_0"]
    sys.argv += ["--no-mtp"] * ("qwen" in (args.checkpoint / "config.json").read_text())  # they have no draft layer
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
