"""Videos come back as they were written, upright, at any size; errors name the file."""

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from dinov2.eval.extract.video import Video, import_av, is_video
from dinov2.files import remove_leftovers
from dinov2.visualization.video import writing_video


def frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A green square that moves over a red ramp."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 200, width)
    pixels[10:20, number * 4 : number * 4 + 12] = (0, 255, 0)
    return pixels


def write(path: Path, num_frames: int = 12, rate: Fraction = Fraction(25, 2)) -> Path:
    with writing_video(path, rate) as add:
        for number in range(num_frames):
            add(frame(number))
    return path


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_frames_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    video = Video(write(tmp_path / name))
    frames = list(video.arrays())
    assert (len(frames), video.size, video.rate) == (12, (64, 48), Fraction(25, 2))
    assert video.expected_frames == video.count_frames() == 12
    for number, pixels in enumerate(frames):
        assert np.abs(pixels.astype(int) - frame(number)).mean() < 4


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_frames_come_at_the_size_asked_for_and_one_of_several(tmp_path: Path, name: str) -> None:
    frames = list(Video(write(tmp_path / name)).arrays((31, 17), every=5))
    assert [pixels.shape for pixels in frames] == [(17, 31, 3)] * 3
    expected = np.asarray(Image.fromarray(frame(10)).resize((31, 17), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(frames[2].astype(int) - expected).mean() < 6


def test_an_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    with av.open(str(write(tmp_path / "clip.mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
    data = (tmp_path / "clip.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat"), "it starts to play before it is loaded"


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(1000000, 33367), Fraction(1, 3), Fraction(120)])
def test_any_rate_is_kept_in_an_mp4_and_about_kept_in_a_gif(tmp_path: Path, rate: Fraction) -> None:
    assert Video(write(tmp_path / "clip.mp4", rate=rate)).rate == rate
    assert Video(write(tmp_path / "clip.gif", rate=rate)).rate == pytest.approx(min(rate, 50), rel=0.15)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_videos_filmed_sideways_are_turned_upright(tmp_path: Path, matrix: tuple[int, ...], turns: int) -> None:
    path = write(tmp_path / "clip.mp4")
    plain = next(Video(path).arrays())
    data = bytearray(path.read_bytes())
    header = data.index(b"tkhd") + 4 + 40  # the transformation a, b, u, c, d, v, ... in 16.16 numbers
    a, b, c, d = (number << 16 for number in matrix)
    data[header : header + 20] = struct.pack(">5i", a, b, 0, c, d)
    path.write_bytes(data)
    video = Video(path)
    assert video.size == ((48, 64) if turns % 2 else (64, 48))
    assert np.array_equal(next(video.arrays()), np.rot90(plain, turns))
    assert next(video.arrays((20, 30))).shape == (30, 20, 3)


def test_a_gif_with_several_frames_is_a_video(tmp_path: Path) -> None:
    Image.new("P", (4, 4)).save(tmp_path / "still.gif")
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    assert not is_video(tmp_path / "still.gif") and not is_video(tmp_path / "broken.gif")
    assert (
        is_video(write(tmp_path / "moving.gif")) and is_video(tmp_path / "A.MP4") and not is_video(tmp_path / "a.png")
    )


def test_files_that_are_no_videos_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no video {tmp_path}/none.mp4"):
        Video(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_bytes(b"hello " * 100)
    with pytest.raises(ValueError, match=f"cannot read the video {tmp_path}/text.mp4"):
        Video(tmp_path / "text.mp4")
    whole = write(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 4])
    with pytest.raises(ValueError, match=f"{tmp_path}/half.mp4"):
        Video(tmp_path / "half.mp4")


def test_audio_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound) + stream.encode(None))
    with pytest.raises(ValueError, match=r"sound.mp4 has no video stream, only audio"):
        Video(path)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif"])
def test_the_temporary_file_is_removed_when_its_process_was_killed_and_kept_while_it_lives(
    tmp_path: Path, name: str
) -> None:
    code = (
        "import sys; from fractions import Fraction; from pathlib import Path; import numpy as np\n"
        "from dinov2.visualization.video import writing_video\n"
        "with writing_video(Path(sys.argv[1]), Fraction(25)) as add:\n"
        "    add(np.zeros((48, 64, 3), np.uint8))\n"
        "    print('here', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"here\n"
        remove_leftovers(tmp_path)
        assert len(list(tmp_path.iterdir())) == 1
        writer.kill()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_formats_are_not_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"videos are written as \.mp4 or \.gif, not as 'clip.avi'"),
        writing_video(tmp_path / "clip.avi", Fraction(25)),
    ):
        pass


def test_a_video_that_is_not_finished_leaves_the_former_one(tmp_path: Path) -> None:
    former = write(tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(RuntimeError, match="stop"), writing_video(tmp_path / "clip.mp4", Fraction(25)) as add:
        add(frame(0))
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == former


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        Video(path)


def test_a_package_too_old_to_turn_videos_upright_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(__version__="14.0.1", VideoFrame=object))
    with pytest.raises(ValueError, match=r"av 14\.1 or newer.*not 14\.0\.1"):
        import_av()


def test_ffmpeg_logs_nothing(tmp_path: Path) -> None:
    write(tmp_path / "clip.mp4")
    assert av.logging.get_level() is None, "with a log level its threads and Python's may wait for each other forever"
