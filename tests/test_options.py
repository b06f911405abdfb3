from __future__ import annotations

import pytest

from sparse_backend import OptionError, Options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fromat": "auto"}, "unknown option 'fromat'; did you mean 'format'"),
        ({"format": "nm"}, "'format' = 'nm' is not available; allowed: auto, dense, bitmask, sell, ternary, int8"),
        ({"format": ["auto"]}, "'format'"),
        ({"rules": [{"match": "a*", "format": "dense", "sparsity": 0.5}]}, "match 'a[*]': options"),
        ({"values": "fp8"}, "allowed: null, bf16, fp16, bf16x12, int8, int4"),
        ({"bits": 3}, "option 'bits' = 3 is not available; allowed: null, 2, 1.6"),
        ({"bits": 2, "format": "bitmask"}, "'bits' and 'format' contradict"),
        ({"bits": True}, "'bits'"),
        ({"method": "wanda"}, "allowed: magnitude"),
        ({"pattern": "2:4"}, "allowed: unstructured"),
        ({"group_size": 100}, "'group_size' = 100 is not available; allowed: null, 32, 64, 128, 256"),
        ({"activations": "int4"}, "allowed: null, keep, int8"),
        ({"lm_head": "int4"}, "allowed: keep, int8"),
        ({"sparsity": 1.0}, "0 <= s < 1"),
        ({"sparsity": -0.1}, "0 <= s < 1"),
        ({"sparsity": "half"}, "no number"),
        ({"sparsity": True}, "no number"),
        ({"sparsity": float("nan")}, "out of range"),
        ({"batch": 8}, "'batch' = 8 is not available; allowed: 1"),
        ({"format": "dense", "sparsity": 0.5}, "contradict"),
        ({"ignore": "lm_head"}, "must be a list"),
        ({"ignore": ["re:("]}, "no regular expression"),
        ({"ignore": [""]}, "non-empty"),
        ({"rules": [{"format": "dense"}]}, "'match' pattern"),
        ({"rules": [{"match": "*", "formt": "dense"}]}, "did you mean 'format'"),
        ({"rules": [{"match": "*", "ignore": []}]}, "cannot be set per module"),
        ({"rules": [{"match": "*", "values": "fp8"}]}, "allowed: null, bf16, fp16"),
    ],
)
def test_bad_options_name_the_key_and_what_is_allowed(values, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        Options.from_dict(values)


def test_round_trip_through_json():
    options = Options.from_dict(
        {
            "quant_method": "sparse-compiled",
            "sparsity": 0.5,
            "ignore": ["*.q_proj"],
            "rules": [{"match": "re:.*down.*", "sparsity": 0.7}],
        }
    )
    assert Options.from_dict(options.to_dict()) == options
    assert Options().to_dict() == {"quant_method": "sparse-compiled"}


def test_first_matching_rule_wins_and_ignore_beats_rules():
    options = Options(
        sparsity=0.5,
        ignore=("*.layers.0.*",),
        rules=({"match": "*.down_proj", "sparsity": 0.7}, {"match": "re:.*_proj", "format": "bitmask"}),
    )
    assert options.for_module("model.layers.0.mlp.down_proj") is None
    assert options.for_module("model.layers.1.mlp.down_proj").sparsity == 0.7
    assert options.for_module("model.layers.1.mlp.down_proj").format == "auto"
    assert options.for_module("model.layers.1.mlp.up_proj").format == "bitmask"
    assert options.for_module("model.layers.1.mlp.other") == Options(sparsity=0.5)


def test_a_module_left_dense_by_a_rule_is_not_pruned():
    options = Options(sparsity=0.5, rules=({"match": "*.o_proj", "format": "dense"},))
    assert options.for_module("a.o_proj").sparsity is None
    assert options.for_module("a.q_proj").sparsity == 0.5
