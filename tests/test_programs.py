"""The table of programs against what was seen in each program (the recipe's verdicts, tool by tool)."""

from dataclasses import replace

import pytest

from sumizome.programs import FolderScheduler, ModelFacts, verdicts

OURS = ModelFacts(
    layout="file",
    prediction_type="v_prediction",
    zero_terminal_snr=True,
    has_v_pred=True,
    has_ztsnr=True,
    stated="v-zsnr",
    has_model_spec=True,
    sidecar="v_prediction",
    table_reaches_zero_snr=True,
)
FOLDER = ModelFacts("folder", "v_prediction", True, scheduler=FolderScheduler("v_prediction", True, True, "trailing"))
BARE = ModelFacts("file", "v_prediction", True)
"""A v-prediction model whose file does not say so, as several trainers write it."""


def rows(facts: ModelFacts) -> dict[str, tuple[str | None, bool | None]]:
    return {row.program: (row.prediction_type, row.zero_terminal_snr) for row in verdicts(facts)}


def actions(facts: ModelFacts) -> dict[str, str]:
    return {row.program: row.action for row in verdicts(facts)}


V, EPSILON = ("v_prediction", True), ("epsilon", False)


def test_our_own_file_just_works_where_that_is_possible() -> None:
    assert rows(OURS) == {
        "ComfyUI": V,
        "Forge": V,
        "A1111 1.10.1": ("v_prediction", False),
        "SwarmUI": V,
        "diffusers": EPSILON,
        "InvokeAI": EPSILON,
        "SD.Next": V,
        "sd.cpp": V,
    }
    todo = actions(OURS)
    assert [name for name, action in todo.items() if action == "none"] == [
        "ComfyUI", "Forge", "SwarmUI", "SD.Next", "sd.cpp"
    ]  # fmt: skip
    assert todo["A1111 1.10.1"].endswith("Noise schedule for sampling = Zero Terminal SNR")
    assert "config=FOLDER" in todo["diffusers"] and "import the folder" in todo["InvokeAI"]


def test_our_own_folder_just_works_in_the_programs_that_open_folders() -> None:
    found, todo = rows(FOLDER), actions(FOLDER)
    for program in ("diffusers", "InvokeAI", "SD.Next"):
        assert found[program] == V and todo[program] == "none"
    assert found["ComfyUI"] == (None, None) and "mend" in todo["ComfyUI"]


def test_an_unmarked_file_is_epsilon_everywhere_and_each_row_says_what_helps() -> None:
    assert set(rows(BARE).values()) == {EPSILON}
    assert all(action != "none" for action in actions(BARE).values())
    assert "ModelSamplingDiscrete" in actions(BARE)["ComfyUI"]
    a1111 = actions(BARE)["A1111 1.10.1"]
    assert "yaml" in a1111 and "Zero Terminal SNR" in a1111


def test_an_unmarked_epsilon_file_is_right_everywhere() -> None:
    assert all(row.right for row in verdicts(ModelFacts("file", "epsilon", False)))


@pytest.mark.parametrize(
    ("facts", "program", "expected"),
    [
        # The SwarmUI trap: metadata "v" switches the terminal step off although the keys are right.
        (replace(OURS, stated="v"), "SwarmUI", ("v_prediction", False)),
        (replace(OURS, stated=""), "SwarmUI", V),
        (replace(OURS, stated="epsilon"), "SwarmUI", EPSILON),
        # ztsnr means nothing without v_pred in ComfyUI.
        (replace(OURS, has_v_pred=False), "ComfyUI", EPSILON),
        (replace(OURS, has_ztsnr=False), "ComfyUI", ("v_prediction", False)),
        # A sidecar wins over the key in Forge, and is all that A1111 1.10.1 knows.
        (replace(OURS, sidecar="epsilon"), "Forge", ("epsilon", True)),
        (replace(OURS, sidecar=None), "Forge", V),
        (replace(OURS, sidecar=None), "A1111 1.10.1", EPSILON),
        # SD.Next goes by the file's name first.
        (replace(BARE, name_says_v=True), "SD.Next", ("v_prediction", False)),
        # sd.cpp ignores ztsnr and reads the table.
        (replace(OURS, table_reaches_zero_snr=False), "sd.cpp", ("v_prediction", False)),
        (replace(OURS, has_edm=True), "ComfyUI", ("EDM", False)),
        (replace(FOLDER, scheduler=FolderScheduler("v_prediction", False, True, "trailing")), "diffusers", V),
    ],
)
def test_each_program_goes_by_its_own_rule(
    facts: ModelFacts, program: str, expected: tuple[str | None, bool | None]
) -> None:
    assert rows(facts)[program] == expected


def test_remarks_where_the_model_is_read_rightly_and_something_is_still_wrong() -> None:
    leading = replace(FOLDER, scheduler=FolderScheduler("v_prediction", True, True, "leading"))
    assert "trailing" in actions(leading)["diffusers"]
    flag_only = replace(FOLDER, scheduler=FolderScheduler("v_prediction", True, False, "trailing"))
    assert "Heun" in actions(flag_only)["diffusers"]
    assert "SDXL 0.9" in actions(replace(OURS, has_model_spec=False))["SwarmUI"]


def test_a_small_or_inpainting_model_is_not_promised_a_sidecar_that_mend_does_not_write() -> None:
    assert actions(replace(BARE, sidecar_fits=False))["A1111 1.10.1"].startswith("nothing helps")
    assert "yaml" not in actions(BARE)["Forge"] and "v_pred" in actions(BARE)["Forge"]


def test_a_wrong_sidecar_is_to_be_removed() -> None:
    wrong = ModelFacts("file", "epsilon", False, sidecar="v_prediction")
    assert actions(wrong)["A1111 1.10.1"].startswith("remove the .yaml")


def test_a_unet_alone_is_for_the_programs_that_load_one() -> None:
    opened = [name for name, (seen, _) in rows(replace(OURS, layout="unet")).items() if seen]
    assert opened == ["ComfyUI", "SwarmUI", "diffusers"]
    assert "text encoders" in actions(replace(OURS, layout="unet"))["Forge"]
    assert "--out NAME.safetensors" in actions(FOLDER)["sd.cpp"]
