"""What 2:4 training does to the loss, with the real kernels: small language models on text that none sees twice.

python -m bench.quality.text FOLDER --out TOKENS      # *.txt or *.txt.xz -> tokens; once
python -m bench.quality.study TOKENS --arms NAMES --out FOLDER
python -m bench.quality.report                        # docs/results/quality.md and its pictures
"""
