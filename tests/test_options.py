from __future__ import annotations

import pytest

from sparse_backend import OptionError, Options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fromat": "auto"}, "unknown option 'fromat'; did you mean 'format'"),
        (
            {"format": "monarch"},
            "'format' = 'monarch' is not available; allowed: auto, dense, bitmask, sell, nm, block, ternary, ",
        ),
        ({"format": ["auto"]}, "'format'"),
        ({"rules": [{"match": "a*", "format": "dense", "sparsity": 0.5}]}, "match 'a[*]': options"),
        ({"values": "fp8"}, "allowed: null, bf16, fp16, bf16x12, int8, int4"),
        ({"bits": 3}, "option 'bits' = 3 is not available; allowed: null, 2, 1.6"),
        ({"bits": 2, "format": "bitmask"}, "'bits' and 'format' contradict"),
        ({"bits": True}, "'bits'"),
        ({"format": "sell", "values": "int8", "group_size": 64}, "format sell has groups of 128, 256 columns"),
        ({"format": "bitmask", "values": "int4", "group_size": 32}, "'group_size' and 'format' contradict"),
        ({"format": "bf16x12", "values": "fp16"}, "stores bf16, not fp16"),
        ({"format": "int8", "activations": "int8"}, "'activations' and 'format' contradict"),
        ({"method": "obs"}, "allowed: magnitude, wanda, sparsegpt"),
        ({"pattern": "1:4"}, "allowed: unstructured, 2:4, 4:8, 8:16, 6:16, 4:16, block:16x16, block:32x32"),
        ({"allocation": "owl"}, "allowed: uniform, error"),
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 prunes 0.5, not 0.6; drop 'sparsity'"),
        ({"pattern": "8:16", "sparsity": 0}, "'sparsity' and 'pattern' contradict"),
        ({"pattern": "4:8", "format": "dense"}, "'pattern' and 'format' contradict"),
        ({"pattern": "4:8", "allocation": "error"}, "'allocation' and 'pattern' contradict"),
        (
            {"method": "sparsegpt", "pattern": "block:16x16"},
            "sparsegpt makes no blocks; allowed with it: unstructured, 2:4",
        ),
        ({"method": "sparsegpt", "allocation": "error"}, "allocation error is for methods magnitude and wanda"),
        (
            {"pattern": "2:4", "rules": [{"match": "a*", "sparsity": 0.7}]},
            "match 'a[*]': options 'sparsity' and 'pattern'",
        ),
        ({"calibration": "text.txt"}, "unknown option 'calibration'"),
        ({"group_size": 100}, "'group_size' = 100 is not available; allowed: null, 32, 64, 128, 256"),
        ({"activations": "int4"}, "allowed: null, keep, int8"),
        ({"lm_head": "int4"}, "allowed: keep, int8"),
        ({"sparsity": 1.0}, "0 <= s < 1"),
        ({"sparsity": -0.1}, "0 <= s < 1"),
        ({"sparsity": "half"}, "no number"),
        ({"sparsity": True}, "no number"),
        ({"sparsity": float("nan")}, "out of range"),
        ({"batch": 0}, "'batch' = 0 is not available; allowed: whole numbers from 1 on"),
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


def test_patterns_say_their_sparsity_and_rules_change_it():
    assert Options().target_sparsity == 0.0
    assert Options(sparsity=0.7, pattern="block:32x32").target_sparsity == 0.7
    for pattern in ("2:4", "4:8", "8:16"):
        assert Options(pattern=pattern).target_sparsity == 0.5
        assert Options(pattern=pattern, sparsity=0.5).target_sparsity == 0.5
    options = Options(
        sparsity=0.7,
        allocation="error",
        rules=({"match": "*.q_proj", "pattern": "2:4"}, {"match": "*.o_proj", "format": "dense"}),
    )
    assert options.for_module("a.q_proj") == Options(pattern="2:4")
    assert options.for_module("a.o_proj").target_sparsity == 0.0
    assert options.for_module("a.k_proj").target_sparsity == 0.7
    half = Options(pattern="2:4", rules=({"match": "*.o_proj", "format": "dense"},))
    assert half.for_module("a.o_proj").target_sparsity == 0.0
    assert half.for_module("a.q_proj").target_sparsity == 0.5


def test_rules_reset_what_their_format_has_not():
    for name in ("bf16x12", "int8", "ternary", "int4"):
        rules = ({"match": "*o_proj", "format": name},)
        module = Options(values="int4", group_size=64, rules=rules).for_module("layers.0.o_proj")
        assert (module.format, module.values) == (name, None)
        assert module.group_size == (64 if name in ("int4", "ternary") else None)


def test_merged_parts_must_agree_in_their_groups():
    from sparse_backend.engines.names import Names, options_for

    names = Names(merged={"qkv_proj": ["q_proj", "k_proj", "v_proj"]})
    options = Options(values="int4", rules=({"match": "*.k_proj", "group_size": 32},))
    with pytest.raises(OptionError, match="treat differently"):
        options_for(options, names, "layers.0.qkv_proj")
