"""What `.ci/run` says about skipped tests."""

from check_skips import main, wrong_skips


def test_only_the_machine_is_a_reason(tmp_path, capsys):
    results = tmp_path / "results.xml"
    results.write_text(
        """<testsuites><testsuite>
        <testcase classname="tests.a" name="good"/>
        <testcase classname="tests.a" name="gpu"><skipped message="needs a CUDA device"/></testcase>
        <testcase classname="tests.b" name="x"><skipped message="could not import 'matplotlib'"/></testcase>
        </testsuite></testsuites>"""
    )
    assert wrong_skips(results) == ["tests.b.x: could not import 'matplotlib'"]
    assert main([str(results)]) == 1
    assert "tests.b.x" in capsys.readouterr().out
