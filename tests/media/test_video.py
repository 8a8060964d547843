from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from films import decoded, ffmpeg, film, tones
from PIL import Image

from pnp_batch.errors import ItemError
from pnp_batch.media.encode import FORMATS, Look, Sound, shortcomings, side_by_side, write_video
from pnp_batch.media.images import Pixels
from pnp_batch.media.video import Footage, Timing, VideoReader, numbered, survey_of


def frames_of(path: Path) -> tuple[Footage, list[Pixels]]:
    footage = survey_of(path)
    reader = VideoReader(path, footage)
    return footage, [reader.frame(n, footage.size) for n in range(len(footage.timing.times))]


def look(footage: Footage) -> Look:
    return Look(footage.timing.regular(footage.nominal), Fraction(*footage.size), footage.rotation)


def smooth(count: int, width: int = 64, height: int = 48) -> list[Pixels]:
    x, y = np.meshgrid(np.linspace(40, 200, width), np.linspace(60, 180, height))
    return [np.stack([x, y, np.full_like(x, 50 + 100 * n / count)], -1).astype(np.uint8) for n in range(count)]


class TestReading:
    def test_frames_are_those_that_ffmpeg_decodes(self, tmp_path: Path) -> None:
        path = film(tmp_path / "a.mp4")
        _, frames = frames_of(path)
        assert np.abs(np.stack(frames).astype(int) - decoded(path, (96, 64))).max() <= 2  # rounding of colours

    @pytest.mark.parametrize(
        "suffix", ["mp4", "mov", pytest.param("webm", marks=pytest.mark.slow), "mkv", "gif", "avi"]
    )
    def test_every_kind_of_file(self, tmp_path: Path, suffix: str) -> None:
        footage, frames = frames_of(film(tmp_path / f"a.{suffix}"))
        assert (len(frames), footage.size, footage.audio) == (25, (96, 64), suffix != "gif")
        assert footage.timing.seconds == pytest.approx(1, abs=0.05) and not footage.problem

    def test_the_rate_of_cinema_is_exact(self, tmp_path: Path) -> None:
        mp4 = survey_of(film(tmp_path / "a.mp4", rate="24000/1001", seconds=2))
        assert mp4.timing.rate == Fraction(24000, 1001) and mp4.timing.is_constant
        webm = survey_of(film(tmp_path / "a.webm", rate="24000/1001", seconds=2))  # which rounds to milliseconds
        assert not webm.timing.is_constant and webm.timing.regular(webm.nominal).rate == Fraction(24000, 1001)

    def test_a_variable_rate_is_kept(self, tmp_path: Path) -> None:
        path = film(tmp_path / "a.mp4", "-vf", "select='not(mod(n,3))+lt(n,5)'", "-fps_mode", "vfr")
        timing = survey_of(path).timing
        steps = {b - a for a, b in zip(timing.times, timing.times[1:], strict=False)}
        assert len(steps) == 3 and not timing.is_constant and timing.regular(Fraction(25)) == timing

    @pytest.mark.parametrize("degrees", [90, 180, 270])
    def test_a_turned_clip_comes_upright(self, tmp_path: Path, degrees: int) -> None:
        plain = film(tmp_path / "a.mp4")
        turned = tmp_path / "turned.mp4"
        ffmpeg("-display_rotation", degrees, "-i", plain, "-c", "copy", turned)
        footage, frames = frames_of(turned)
        assert footage.rotation == degrees and footage.size == ((96, 64) if degrees == 180 else (64, 96))
        assert np.abs(np.stack(frames).astype(int) - decoded(turned, footage.size)).max() <= 2

    def test_pixels_that_are_not_square(self, tmp_path: Path) -> None:
        assert survey_of(film(tmp_path / "a.mp4", "-vf", "setsar=4/3")).size == (128, 64)

    def test_odd_sizes(self, tmp_path: Path) -> None:
        _, frames = frames_of(film(tmp_path / "a.mp4", "-vf", "crop=95:61:exact=1", "-pix_fmt", "yuv444p"))
        assert frames[0].shape == (61, 95, 3)

    @pytest.mark.slow
    def test_any_frame_at_any_time_is_the_same(self, tmp_path: Path) -> None:
        path = film(tmp_path / "a.mp4", "-g", "50", seconds=8)  # 200 frames, some of them far from a keyframe
        footage, frames = frames_of(path)
        reader = VideoReader(path, footage)
        for number in (199, 3, 120, 121, 119, 70, 0):
            assert np.array_equal(reader.frame(number, footage.size), frames[number])

    def test_numbered_pictures_are_a_clip(self, tmp_path: Path) -> None:
        for number in (1, 2, 10):
            Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"shot{number}.png")
        Image.new("RGB", (8, 6)).save(tmp_path / "cover.png")
        footage = survey_of(tmp_path, rate=Fraction(12))
        assert list(numbered(tmp_path).values()) == ["shot1.png", "shot2.png", "shot10.png"]
        assert footage.timing.rate == 12 and VideoReader(tmp_path, footage).frame(2, (8, 6))[0, 0, 0] == 10

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                ("f1.png", "f2.png", "mask1.png", "mask2.png"),
                r"several clips \(f#\.png, mask#\.png\); give each a folder",
            ),
            (("f1.png", "f1.jpg"), "several clips"),
            (("f1.png", "f01.png", "f2.png"), "f01.png and f1.png have the same number"),
            (("cover.png",), "holds no numbered pictures"),
        ],
    )
    def test_folders_that_are_no_clip_say_why(self, tmp_path: Path, names: tuple[str, ...], message: str) -> None:
        for name in names:
            Image.new("RGB", (8, 6)).save(tmp_path / name)
        with pytest.raises(ItemError, match=message):
            survey_of(tmp_path)

    def test_a_cover_with_a_number_is_no_frame_and_gaps_are_told(self, tmp_path: Path) -> None:
        for name in ("f1", "f2", "f5", "f6", "f9"):
            Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.png")
        Image.new("RGB", (80, 60)).save(tmp_path / "cover_2024.png")
        footage = survey_of(tmp_path)
        assert footage.size == (8, 6) and footage.files == ("f1.png", "f2.png", "f5.png", "f6.png", "f9.png")
        assert footage.notes[0].startswith("after number 2 comes 5 and 1 more gaps")

    def test_frames_of_several_sizes_are_refused(self, tmp_path: Path) -> None:
        for n, size in enumerate([(8, 6), (8, 6), (6, 8)]):
            Image.new("RGB", size).save(tmp_path / f"{n}.png")
        with pytest.raises(ItemError, match=r"2\.png has 6x8 pixels, 0\.png 8x6"):
            survey_of(tmp_path)

    def test_a_broken_picture_ends_a_folders_clip_unless_it_is_to_go_on(self, tmp_path: Path) -> None:
        for n in range(4):
            Image.new("RGB", (8, 6)).save(tmp_path / f"{n}.png")
        (tmp_path / "2.png").write_text("nonsense")
        assert "2.png" in survey_of(tmp_path).problem and len(survey_of(tmp_path).files) == 2
        assert survey_of(tmp_path, lenient=True).files == ("0.png", "1.png", "3.png")

    @pytest.mark.parametrize(
        "turn",
        [
            ("-display_hflip",),
            ("-display_vflip",),
            ("-display_rotation", 90, "-display_hflip"),
            ("-display_rotation", 270, "-display_vflip"),
            ("-display_rotation", 180),
        ],
    )
    def test_mirrored_and_turned_clips_are_read_as_they_are_shown(
        self, tmp_path: Path, turn: tuple[object, ...]
    ) -> None:
        ffmpeg(*turn, "-i", film(tmp_path / "a.mp4", seconds=0.1), "-c", "copy", tmp_path / "b.mp4")
        footage, frames = frames_of(tmp_path / "b.mp4")
        shown = decoded(tmp_path / "b.mp4", footage.size)
        assert np.abs(np.stack(frames).astype(int) - shown).mean() < 2
        write_video(tmp_path / "out.mp4", frames, look(footage))
        again = decoded(tmp_path / "out.mp4", footage.size)
        assert np.abs(again.astype(int) - shown).mean() < 6

    def test_a_cover_picture_is_not_the_clip(self, tmp_path: Path) -> None:
        Image.new("RGB", (40, 40)).save(tmp_path / "cover.png")
        for suffix, inputs in (("m4a", ()), ("mp4", ("-i", film(tmp_path / "a.mp4", seconds=0.2)))):
            tone = ("-f", "lavfi", "-i", "sine=duration=1", "-i", tmp_path / "cover.png")
            streams = ("-map", "0", "-map", "1", *(("-map", "2:v") if inputs else ()), "-c:v:0", "png")
            ffmpeg(*tone, *inputs, *streams, "-disposition:v:0", "attached_pic", tmp_path / f"b.{suffix}")
        with pytest.raises(ItemError, match="holds no video"):
            survey_of(tmp_path / "b.m4a")
        footage, frames = frames_of(tmp_path / "b.mp4")
        assert footage.size == (96, 64) and len(frames) == 5

    def test_what_is_lost_is_noted(self, tmp_path: Path) -> None:
        colours = ("-vf", "setparams=color_primaries=bt2020:color_trc=smpte2084:colorspace=bt2020nc")
        hdr = film(tmp_path / "hdr.mp4", "-pix_fmt", "yuv420p10le", *colours, seconds=0.1)
        two = tmp_path / "two.mp4"
        ffmpeg("-i", hdr, "-map", "0:v", "-map", "0:a", "-map", "0:a", "-c", "copy", two)
        notes = survey_of(two).notes
        assert any("HDR (PQ)" in note for note in notes) and any("2 sound tracks" in note for note in notes)
        assert not survey_of(film(tmp_path / "a.mp4", seconds=0.1)).notes

    def test_what_was_seen_can_be_written_down(self, tmp_path: Path) -> None:
        footage = survey_of(film(tmp_path / "a.webm"))
        assert Footage.from_json(json.loads(json.dumps(footage.as_json()))) == footage


class TestDamage:
    def test_a_file_that_was_cut_off_is_known_and_gives_the_frames_it_has_if_asked(self, tmp_path: Path) -> None:
        for name, options in (("a.mp4", ("-movflags", "+faststart")), ("a.webm", ())):
            whole = film(tmp_path / name, *options)
            cut = tmp_path / f"cut-{name}"
            cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
            assert "truncated" in survey_of(cut).problem
            lenient = survey_of(cut, lenient=True)
            assert not lenient.problem and 5 < len(lenient.timing.times) < 25

    def test_a_file_without_its_index_says_what_helps(self, tmp_path: Path) -> None:
        whole = film(tmp_path / "a.mp4")
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with pytest.raises(ItemError, match=r"a\.mp4: not a readable video .*whole copy"):
            survey_of(whole)

    @pytest.mark.slow
    def test_damaged_frames_end_a_clip_unless_it_is_to_go_on(self, tmp_path: Path) -> None:
        path = film(tmp_path / "a.mp4", "-movflags", "+faststart", sound=False)
        data = bytearray(path.read_bytes())
        begin = len(data) * 2 // 3
        for place in range(begin, len(data) - 200, 50):
            data[place : place + 25] = b"\xff" * 25
        path.write_bytes(data)
        strict, lenient = survey_of(path), survey_of(path, lenient=True)
        assert "damaged" in strict.problem or "cannot be decoded" in strict.problem
        assert 0 < len(strict.timing.times) < len(lenient.timing.times)

    @pytest.mark.parametrize("content", [b"", b"no video at all"])
    def test_what_is_no_video(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(ItemError, match=r"a\.mp4: "):
            survey_of(tmp_path / "a.mp4")

    def test_a_sound_file_is_no_video(self, tmp_path: Path) -> None:
        ffmpeg("-f", "lavfi", "-i", "sine=duration=1", tmp_path / "a.m4a")
        with pytest.raises(ItemError, match="holds no video"):
            survey_of(tmp_path / "a.m4a")

    def test_a_playlist_cannot_name_another_file(self, tmp_path: Path) -> None:
        secret = film(tmp_path / "secret.ts")
        (tmp_path / "a.mp4").write_text(
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
        )
        (tmp_path / "b.mp4").write_text(f"ffconcat version 1.0\nfile {secret.name}\n")
        for name in ("a.mp4", "b.mp4"):
            with pytest.raises(ItemError, match="not a readable video"):
                survey_of(tmp_path / name)


class TestWriting:
    @pytest.mark.parametrize("kind", ["mp4", "mov", pytest.param("webm", marks=pytest.mark.slow), "gif"])
    def test_frames_times_and_sound_come_back(self, tmp_path: Path, kind: str) -> None:
        source = film(tmp_path / "a.mp4", rate="24000/1001", seconds=2)
        timing = survey_of(source).timing
        out = tmp_path / f"out{FORMATS[kind].suffix}"
        sound = Sound(source, 0, None) if FORMATS[kind].audio else None
        write_video(out, smooth(48), Look(timing, Fraction(4, 3)), kind, sound)
        footage, frames = frames_of(out)
        assert len(frames) == 48 and footage.audio == (kind != "gif")
        assert float(footage.timing.regular(footage.nominal).rate) == pytest.approx(24000 / 1001, abs=0.02)
        far = np.abs(np.stack(frames).astype(int) - np.stack(smooth(48)))
        assert far.mean() < (8 if kind == "gif" else 4)  # a wrong matrix of colours is off by more than ten
        if sound:
            assert tones(out, 2) == tones(source, 2)

    def test_variable_times_come_back_exactly(self, tmp_path: Path) -> None:
        timing = Timing((0, 512, 1024, 3000, 3512, 9000), 9100, Fraction(1, 15360))
        write_video(tmp_path / "out.mp4", smooth(6), Look(timing, Fraction(4, 3)))
        found = survey_of(tmp_path / "out.mp4").timing
        assert [t * found.tick for t in (*found.times, found.end)] == [
            t * timing.tick for t in (*timing.times, timing.end)
        ]

    @pytest.mark.parametrize("kind", ["mp4", "webm"])
    def test_times_finer_than_containers_can_tell_are_rounded(self, tmp_path: Path, kind: str) -> None:
        timing = Timing((5, 41708338, 83416672), 125125005, Fraction(1, 10**9))
        write_video(tmp_path / "out", smooth(3), Look(timing, Fraction(4, 3)), kind)
        found = survey_of(tmp_path / "out").timing
        wanted = [0, 0.041708, 0.083417]
        assert [float(t * found.tick) for t in found.times] == pytest.approx(
            wanted, abs=1e-3 if kind == "webm" else 1e-6
        )

    @pytest.mark.parametrize("kind", ["mp4", "webm"])
    def test_what_an_encoder_refuses_is_that_videos_error(self, tmp_path: Path, kind: str) -> None:
        backwards = Look(Timing((0, 2, 1), 3, Fraction(1, 10)), Fraction(1))
        with pytest.raises(ItemError, match=rf"could not be written as {kind} \(.*another `container:`"):
            write_video(tmp_path / "out", smooth(3), backwards, kind)

    @pytest.mark.parametrize("kind", ["mp4", "webm", "gif", "frames"])
    @pytest.mark.parametrize("place", [0, 1])
    def test_what_goes_wrong_with_frames_is_not_the_containers_fault(
        self, tmp_path: Path, kind: str, place: int
    ) -> None:
        def frames() -> Iterator[Pixels]:
            yield from smooth(place)
            raise KeyError("elsewhere")

        how = Look(Timing((0, 1, 2), 3, Fraction(1, 10)), Fraction(4, 3))
        with pytest.raises(KeyError, match="elsewhere"):
            write_video(tmp_path / "out", frames(), how, kind)

    def test_a_gif_of_many_frames_a_second_lasts_as_long(self, tmp_path: Path) -> None:
        how = Look(Timing(tuple(range(60)), 60, Fraction(1, 120)), Fraction(4, 3))
        write_video(tmp_path / "a%d.gif", smooth(60), how, "gif")
        found = survey_of(tmp_path / "a%d.gif").timing
        assert found.seconds == pytest.approx(0.5, abs=0.02) and found.rate == pytest.approx(50, abs=1)
        assert list(shortcomings(how, "gif")) == ["a GIF shows at most 50 frames a second: it has 25 of the 60 frames"]

    def test_a_webm_of_variable_rate_says_what_it_loses(self) -> None:
        timing = Timing((0, 33, 66, 101), 200, Fraction(1, 1000))
        assert "last frame" in next(shortcomings(Look(timing, Fraction(1)), "webm"))

    @pytest.mark.parametrize("kind", ["gif", "frames"])
    def test_files_that_know_only_square_pixels_get_them(self, tmp_path: Path, kind: str) -> None:
        how = Look(Timing((0, 1), 2, Fraction(1, 10)), Fraction(3, 2))
        write_video(tmp_path / "out", smooth(2, 32, 32), how, kind)
        first = next((tmp_path / "out").iterdir()) if kind == "frames" else tmp_path / "out"
        assert Image.open(first).size == (48, 32)

    def test_turning_and_aspect_are_those_of_the_source(self, tmp_path: Path) -> None:
        ffmpeg(
            "-display_rotation",
            90,
            "-i",
            film(tmp_path / "a.mp4", "-vf", "setsar=4/3"),
            "-c",
            "copy",
            tmp_path / "b.mp4",
        )
        footage, _ = frames_of(tmp_path / "b.mp4")
        upright = smooth(25, 48, 64)
        write_video(tmp_path / "out.mp4", upright, look(footage), sound=Sound(tmp_path / "b.mp4", 0, None))
        again, frames = frames_of(tmp_path / "out.mp4")
        assert (again.rotation, Fraction(*again.size)) == (90, Fraction(*footage.size))
        back = [np.asarray(Image.fromarray(frame).resize((48, 64))) for frame in frames]
        assert np.abs(np.stack(back).astype(int) - np.stack(upright)).mean() < 4

    @pytest.mark.parametrize("suffix", ["mp4", "mov"])
    def test_sound_is_cut_to_the_range(self, tmp_path: Path, suffix: str) -> None:
        codec = "aac" if suffix == "mp4" else "pcm_s16le"  # which MP4 cannot hold: it is encoded
        source = film(tmp_path / f"a.{suffix}", "-pix_fmt", "yuv420p", "-c:a", codec, seconds=3)
        chosen = survey_of(source).timing.chosen(range(25, 60), 60)
        write_video(
            tmp_path / "out.mp4", smooth(35), Look(chosen, Fraction(4, 3)), sound=Sound(source, 1.0, chosen.seconds)
        )
        assert survey_of(tmp_path / "out.mp4").timing.seconds == pytest.approx(1.4)
        assert tones(tmp_path / "out.mp4", 1.4) == tones(source, 3)[4:9]

    def test_odd_sizes_are_padded_and_not_refused(self, tmp_path: Path) -> None:
        write_video(
            tmp_path / "out.mp4", smooth(3, 33, 21), Look(Timing((0, 1, 2), 3, Fraction(1, 10)), Fraction(33, 21))
        )
        assert len(frames_of(tmp_path / "out.mp4")[1]) == 3

    @pytest.mark.slow
    def test_the_same_frames_give_the_same_bytes(self, tmp_path: Path) -> None:
        source = film(tmp_path / "a.mp4")
        for kind in ("mp4", "mov", "webm", "gif"):
            paths = [tmp_path / f"{n}{FORMATS[kind].suffix}" for n in range(2)]
            for path in paths:
                sound = Sound(source, 0, None) if FORMATS[kind].audio else None
                write_video(path, smooth(25), Look(survey_of(source).timing, Fraction(4, 3)), kind, sound)
            assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_side_by_side(self) -> None:
        (pair,) = side_by_side(smooth(1), [255 - frame for frame in smooth(1)])
        assert pair.shape == (48, 128, 3) and np.array_equal(pair[:, 64:], 255 - pair[:, :64])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path: Path) -> None:
    """Ten minutes at five frames a second, read and written, against thirty seconds."""
    peaks = []
    for count in (150, 3000):
        timing = Timing(tuple(range(count)), count, Fraction(1, 5))
        begin = tmp_path / f"{count}.mp4"
        tracemalloc.start()
        write_video(
            begin, (frame for _ in range(count // 10) for frame in smooth(10, 128, 128)), Look(timing, Fraction(1))
        )
        footage = survey_of(begin)
        write_video(tmp_path / f"{count}-again.mp4", _read(begin, footage), look(footage))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(footage.timing.times) == count
    frame = 128 * 128 * 3
    assert peaks[1] - peaks[0] < 20 * frame  # the times themselves; 2,850 more frames would be 140 MB


def _read(path: Path, footage: Footage) -> Iterator[Pixels]:
    reader = VideoReader(path, footage)
    return (reader.frame(n, footage.size) for n in range(len(footage.timing.times)))
