"""Whole runs: stages one after another, exports, and mistakes that are found before the first step."""

def test_a_dry_run_says_what_the_stage_needs_and_keeps_nothing(base, release, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    train(tiny(STAGES["II"], steps_per_epoch=60), options(base, tmp_path / "out", release, dry_run=True))
    printed = capsys.readouterr().out
    seconds, minutes = (float(x) for x in re.search(r"takes ([\d.]+) s .*take ([\d.]+) minutes", printed).groups())
    assert minutes == pytest.approx(seconds, abs=0.1) and "GB; 60 steps" in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_four_stages_one_after_another(base, release, tmp_path, point_clouds):
    """Each starts from the adapter of the one before and goes on with its factors; the experts start from stage III's."""
    folder, folders = base, {}
    for name in STAGES:
        if name != "own":
            stage = tiny(STAGES[name])
            folder = folders[name] = train(stage, options(folder, tmp_path / name, release, max_steps=2))
            assert [line["lr"] for line in history(folder)] == [learning_rate(stage, step) for step in range(2)]
    folders["IV"], whole = folders["IV"] / "adapter", folders["IV"]
    tensors = {name: load_file(folder / ADAPTER) for name, folder in folders.items()}
    assert not any("lora" in name for name in tensors["I"])

    # What a stage has trained, and nothing else, differs from what the one before has left.
    base_tensors = {f"base_model.model.{name}": t for name, t in load_file(base / "model.safetensors").items()}
    fresh = {n for n in named_parameters(prepare_model(make_tiny_model(make_tiny_config(router_type="none")), tiny(STAGES["II"]))) if "lora" in n}  # fmt: skip
    before = base_tensors
    for name, now in tensors.items():
        moved = {key for key, tensor in now.items() if key not in before or not torch.equal(tensor, before[key])}
        ours = {key.removeprefix("base_model.model.") for key in moved}
        parameters = named_parameters(
            prepare_model(make_tiny_model(make_tiny_config(router_type="none")), tiny(STAGES[name]))
        )
        assert ours and ours <= select_trainable(STAGES[name], parameters) | ({*fresh} if name == "II" else set())
        before = before | now
    fourth = {key.removeprefix("base_model.model.") for key in tensors["IV"]}
    assert fourth >= {
        name
        for name in named_parameters(make_tiny_model(make_tiny_config(router_type="none")))
        if re.search("router|query_experts", name)
    }

    # Resumed by the next stage, loaded by PEFT and by the Auto classes, and merged: the same model.
    for name, folder in folders.items():
        start = find_model(folder)
        assert start.stage["stage"] == name and start.base == str(base)
        resumed = prepare_model(
            load_weights(start.base, dtype=torch.float32), tiny(STAGES[name]), start.adapter, start.stage
        )
        expected = logits(resumed, point_clouds)
        parameters = named_parameters(resumed)
        for key, tensor in tensors[name].items():
            assert torch.equal(parameters[key.removeprefix("base_model.model.")], tensor)
        loaded = AutoModelForImageTextToText.from_pretrained(folder)
        torch.testing.assert_close(logits(loaded, point_clouds), expected, rtol=1e-5, atol=1e-6)
        wrapped = PeftModel.from_pretrained(load_weights(base, dtype=torch.float32), folder)
        torch.testing.assert_close(logits(wrapped, point_clouds), expected, rtol=1e-5, atol=1e-6)
        if name == "IV":
            merged = load_weights(whole, dtype=torch.float32)
            assert merged.config.router_type == "sparse"
            torch.testing.assert_close(logits(merged, point_clouds), expected, rtol=1e-4, atol=1e-5)

    start = find_model(folders["III"])
    fresh = prepare_model(load_weights(base, dtype=torch.float32), tiny(STAGES["IV"]), start.adapter, start.stage)
    experts = [p for name, p in named_parameters(fresh).items() if "query_experts" in name]
    assert all(torch.equal(expert, experts[0]) for expert in experts)
    assert torch.equal(experts[0], tensors["III"]["base_model.model.model.query_experts.0.weight"])
    with pytest.raises(ValueError, match="starts from stage II's result.*is the result of stage IV.*finetune.py"):
        train(tiny(STAGES["III"]), options(whole, tmp_path / "wrong", release))
    # And one's own objects, on the whole model.
    own = train(tiny(STAGES["own"]), options(whole, tmp_path / "own", release, max_steps=2))
    assert find_model(own).base == str(whole)
    loaded = AutoModelForImageTextToText.from_pretrained(own)
    assert loaded.config.router_type == "sparse"
    assert not torch.equal(
        logits(loaded, point_clouds), logits(load_weights(whole, dtype=torch.float32), point_clouds)
    )


def test_export_merges_any_stage(base, release, tmp_path, point_clouds):
    folder = train(tiny(STAGES["II"]), options(base, tmp_path / "II", release, max_steps=2, export=True))
    adapter = AutoModelForImageTextToText.from_pretrained(folder / "adapter")
    merged = AutoModelForImageTextToText.from_pretrained(folder)
    torch.testing.assert_close(logits(merged, point_clouds), logits(adapter, point_clouds), rtol=1e-4, atol=1e-5)
    assert {"README.md", "report.png", "history.jsonl", "stage.json", "processor_config.json"} <= set(
        os.listdir(folder)
    )


def test_a_start_that_is_not_there_is_named(tmp_path, base, release):
    for init, message in (
        (tmp_path / "none", "no such folder"),
        ("nonsense", "no such folder.*OWNER/NAME"),
        (tmp_path, "holds neither a model's config.json nor a PEFT adapter's"),
    ):
        with pytest.raises(ValueError, match=f"--init .*{message}"):
            train(tiny(STAGES["I"]), options(init, tmp_path / "out", release))
    folder = train(tiny(STAGES["I"]), options(base, tmp_path / "I", release, max_steps=1))
    base.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="its base model .* is not there. Correct base_model_name_or_path"):
        train(tiny(STAGES["II"]), options(folder, tmp_path / "out", release))


def test_mistakes_are_told_before_anything_is_loaded(base, release, tmp_path, capsys):
    stage = tiny(STAGES["III"])
    good = options(base, tmp_path / "out", release)
    for changes, message in (
        ({"data": tmp_path / "nowhere"}, "--data .*nowhere is no folder"),
        ({"annotations": [tmp_path / "no.json"]}, "--annotations .*no.json is no file"),
        ({"output_dir": base}, "--output_dir .* exists already"),
        ({"max_steps": 0}, "--max_steps must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(stage, replace(good, **changes))
    brief = write(tmp_path / "brief.json", [record("o0")])
    with pytest.raises(ValueError, match="'detailed' conversations, but there are none"):
        train(stage, replace(good, annotations=[brief]))
    unknown = write(tmp_path / "unknown.json", [record("o0"), record("ghost")])
    with pytest.raises(ValueError, match="1 of 2 annotated objects have no cloud.*'ghost'"):
        train(tiny(STAGES["I"]), replace(good, annotations=[unknown]))
    arguments = ["--init", str(base), "--data", "nowhere", "--annotations", "x", "--output_dir", str(tmp_path / "o")]
    with pytest.raises(SystemExit, match="error: --data nowhere is no folder"):
        loop.main("I", arguments)
    with pytest.raises(SystemExit):
        loop.main("III", ["--help"])
    text = capsys.readouterr().out
    assert "Stage III" in text and "multi_round (4 a step)" in text and "--resume" in text


def test_a_loss_that_is_no_number_stops_the_run(base, release, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", lambda *args: (float("nan"), 1.0))
    with pytest.raises(loop.LossError, match="At step 0 the loss is nan"):
        train(tiny(STAGES["I"]), options(base, tmp_path / "out", release))
    assert not (tmp_path / "out").exists()
