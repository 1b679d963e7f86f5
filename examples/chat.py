"""Talk to a model from Python: one answer, several at once, and a stream.

python examples/chat.py MODEL
"""

import sys

import turbomind_quant as tmq


def main() -> None:
    with tmq.LLM(sys.argv[1]) as llm:
        answer = llm.chat("Name three rivers.", max_tokens=32, temperature=0)
        print(answer.text, f"({len(answer.token_ids)} tokens)")

        # Plain text, continued; several prompts run together.
        for one in llm.generate(["Bread is made of", "The sea is"], max_tokens=8, seed=1):
            print(one.text)

        talk = [
            {"role": "user", "content": "Name three rivers."},
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "Which is the longest?"},
        ]
        for piece in llm.stream(talk, max_tokens=32):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
