"""Makes sentencepiece.json: small vocabularies as GGUF files hold them, and what SentencePiece makes of some texts.

Needs sentencepiece: `python make_sentencepiece.py > sentencepiece.json`.
"""

import io
import json

import sentencepiece as spm

CORPUS = [
    "The old lighthouse keeper climbed the winding stairs every evening to light the lamp.",
    "Ships passing in the night depended on its steady beam to find their way home.",
    "One winter a great storm rolled in from the north, and the waves rose higher than anyone could remember.",
    "The keeper did not sleep for three days, keeping the light burning while the thunder rolled.",
    "Der alte Leuchtturm stand noch lange; die Wellen schlugen gegen die Steine.",
    "def keep(light):\n    return light.burn(days=3)",
] * 20
TEXTS = [
    "The keeper of the lighthouse",
    "  two spaces, and a tail  ",
    "42 storms in 1913",
    "unknown: 東京 🙂 naïve",
    "ships' keepers; light(burn)",
    "",
]


def case(prefix):
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=440,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<turn>"],
        minloglevel=2,
    )
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    ids = range(sp.get_piece_size())

    def kind(i):
        if sp.is_unknown(i):
            return 2
        if sp.is_control(i):
            return 3
        if sp.is_byte(i):
            return 6
        return 4 if sp.id_to_piece(i) == "<turn>" else 1

    return {
        "add_space_prefix": prefix,
        "tokens": [sp.id_to_piece(i) for i in ids],
        "scores": [sp.get_score(i) for i in ids],
        "types": [kind(i) for i in ids],
        "texts": [{"text": t, "ids": sp.encode(t)} for t in TEXTS],
    }


if __name__ == "__main__":
    print(json.dumps({"made_with": f"sentencepiece {spm.__version__}", "cases": [case(True), case(False)]}))
