"""Every published data set in its own format, with one or two clips a split; plain data.

`FILES` holds the annotation files of each by name, as text or as what JSON says, `MEDIA` the names
of its media files; `fill` writes both into a folder.
"""

import functools
import io
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence

from clips import write_clip
from PIL import Image

LINK = "http://host/a.jpg?x=1"
CRC = zlib.crc32(LINK.encode())
CLIP = "0001_American_Beauty_00.00.51.926-00.00.54.129"
WEBVID = (
    "videoid,name,page_idx,page_dir,duration,contentUrl\n"
    '7,"A dog, running",1,000001_000050,PT00H00M09S,https://host/7.mp4\n'
)
REGION = {"region_id": 1, "width": 3, "height": 2, "image_id": 1, "x": 0, "y": 0}
HVU = "Tags,youtube_id,time_start,time_end\ndog|grass,abcdefghijk,1.5,11.5\n"
MC_HEADER = "gif_name\tquestion\ta1\ta2\ta3\ta4\ta5\tanswer\tvid_id\tkey\n"
MC_TABLE = MC_HEADER + "a\tWhat does it do 2 times ?\trun\tjump\tsit\teat\tbark\t4\tACTION4\t26\n"
FRAME_TABLE = (
    "gif_name\tquestion\tanswer\ttype\tvid_id\tkey\tdescription\n"
    "a\twhat runs ?\tdog\t0\tFRAMEQA1\t2\ta dog runs .\n"
    'b\twhat is the color ?\tred\t2\tFRAMEQA2\t3\ta "red" hat .\n'
)
MSRVTT_VIDEOS = [f"videos/video{number}.mp4" for number in (0, 1, 9770)]


def lsmdc_row(clip, sentence):
    return f"{clip}\t00.00.51.926\t00.00.54.129\t00.00.51.926\t00.00.54.129\t{sentence}\n"


def coco_image(number, split):
    name = f"COCO_val2014_{number:012d}.jpg"
    sentences = [{"raw": f"image {number}", "tokens": ["image"], "imgid": 0, "sentid": 0}]
    return {"filepath": "val2014", "filename": name, "split": split, "sentences": sentences}


def msrvtt_question(video_id, question, answer):
    fields = {"answer": answer, "category_id": 14, "id": 0}
    return fields | {"question": question, "video_id": video_id}


def qa_entry(number, question="who runs ?"):
    return {"id": 0, "question": question, "answer": "dog", "video_id": number}


def activity_question(video="a"):
    return {"video_name": video, "question": "is it red", "question_id": f"v_{video}_1"}


def activity_answer(video="a", kind=3):
    return {"answer": "no", "type": kind, "question_id": f"v_{video}_1"}


def described(video, text):
    return {"annotation_id": 1, "video": video, "description": text, "times": [[0, 1]]}


MSRVTT = {
    "MSRVTT_data.json": {
        "info": {},
        "videos": [{"category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "id": 0}],
        "sentences": [
            {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
            {"caption": "a dog barks", "video_id": "video1", "sen_id": 1},
            {"caption": "a red car", "video_id": "video0", "sen_id": 2},
            {"caption": "a man talks", "video_id": "video9770", "sen_id": 3},
        ],
    },
    "MSRVTT_train.9k.csv": "video_id\nvideo0\nvideo1\n",
    "MSRVTT_train.7k.csv": "video_id\nvideo0\n",
    "MSRVTT_JSFUSION_test.csv": (
        'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a man, talking"\n'
    ),
}
FILES = {
    "msrvtt_9k": MSRVTT,
    "msrvtt_7k": MSRVTT,
    "msrvtt_qa": {
        "train_qa.json": [
            msrvtt_question(0, "what is being shown?", "car"),
            msrvtt_question(1, "who barks?", "dog"),
            msrvtt_question(0, "is it red?", "yes"),
        ],
        "val_qa.json": [msrvtt_question(9770, "what talks?", "man")],
        "test_qa.json": [msrvtt_question(9770, "what talks?", "man")],
    },
    "msrvtt_mc": {
        "msrvtt_mc_test.json": [
            {
                "video": "video9770.mp4",
                "caption": ["a cat", "a man talks", "a car", "a dog", "a song"],
                "answer": 1,
            }
        ]
    },
    "msvd": {
        "train_list.txt": "a_0_5\n",
        "val_list.txt": "b_1_2\n",
        "test_list.txt": "b_1_2\n",
        "AllVideoDescriptions.txt": (
            "# Copyright\n\na_0_5 a dog runs\nb_1_2 a cat\na_0_5 the dog\nb_1_2 a cat\n"
        ),
    },
    "msvd_qa": {
        "train_qa.json": [qa_entry(1), qa_entry(1, "what runs ?")],
        "val_qa.json": [qa_entry(2)],
        "test_qa.json": [qa_entry(2)],
        "youtube_mapping.txt": "a_0_5 vid1\nb_1_2 vid2\n",
    },
    "tgif_action": dict.fromkeys(
        ("Train_action_question.csv", "Test_action_question.csv"), MC_TABLE
    ),
    "tgif_transition": dict.fromkeys(
        ("Train_transition_question.csv", "Test_transition_question.csv"), MC_TABLE
    ),
    "tgif_frame": dict.fromkeys(
        ("Train_frameqa_question.csv", "Test_frameqa_question.csv"), FRAME_TABLE
    ),
    "didemo": {
        "train_data.json": [
            described("c@N00_1.mov", "a dog runs "),
            described("d@N00_2.avi", "a cat"),
            described("c@N00_1.mov", "it stops."),
        ],
        "val_data.json": [described("d@N00_2.avi", "a cat")],
        "test_data.json": [described("d@N00_2.avi", "a cat")],
    },
    "activitynet": {
        "train.json": {"v_a": {"duration": 9.0, "sentences": ["A dog.", " It runs."]}},
        "val_1.json": {"v_b": {"duration": 9.0, "timestamps": [[0, 9]], "sentences": ["A cat."]}},
    },
    "activitynet_qa": {
        f"{split}_{letter}.json": content
        for split in ("train", "val", "test")
        for letter, content in (("q", [activity_question()]), ("a", [activity_answer()]))
    },
    "ssv2_label": {
        "ssv2_ret_label_train.json": [{"video": "1.webm", "caption": "holding a cup"}],
        "ssv2_ret_label_val_small.json": [{"video": ["2.webm"], "caption": "a cup"}],
    },
    "ssv2_template": {
        "ssv2_ret_template_train.json": [{"video": "1.webm", "caption": "Holding [something]"}],
        "ssv2_ret_template_val_small.json": [{"video": ["1.webm", "2.webm"], "caption": "Hold"}],
    },
    "lsmdc": {
        "LSMDC16_annos_training.csv": lsmdc_row(CLIP, 'SOMEONE says "hi.') + lsmdc_row(CLIP, "B."),
        "LSMDC16_annos_val.csv": lsmdc_row(CLIP, "A."),
        "LSMDC16_challenge_1000_publictect.csv": lsmdc_row(CLIP, "A."),
    },
    "hvu": {"HVU_Train_V1.0.csv": HVU, "HVU_Val_V1.0.csv": HVU},
    "webvid_2m": {"results_2M_train.csv": WEBVID, "results_2M_val.csv": WEBVID},
    "webvid_10m": {"results_10M_train.csv": WEBVID, "results_10M_val.csv": WEBVID},
    "cc3m": {
        "Train_GCC-training.tsv": f'"a dog" runs\t{LINK}\n',
        "Validation_GCC-1.1.0-Validation.tsv": f"a dog\t{LINK}\n",
    },
    "cc12m": {"cc12m.tsv": f"{LINK}\ta dog\n"},
    "sbu": {
        "sbu-captions-all.json": {
            "image_urls": ["http://static.flickr.com/2723/43_b0.jpg"],
            "captions": ["A dog."],
            "user_ids": ["x"],
        }
    },
    "coco": {
        "dataset_coco.json": {
            "images": [
                coco_image(number, split)
                for number, split in enumerate(("test", "train", "restval", "val"))
            ],
            "dataset": "coco",
        }
    },
    "visual_genome": {
        "region_descriptions.json": [
            {"id": 1, "regions": [REGION | {"phrase": "a dog"}, REGION | {"phrase": "green grass"}]}
        ]
    },
}
MEDIA = {
    **dict.fromkeys(("msrvtt_9k", "msrvtt_7k", "msrvtt_qa", "msrvtt_mc"), MSRVTT_VIDEOS),
    "msvd": ["videos/a_0_5.avi", "videos/b_1_2.avi"],
    "msvd_qa": ["videos/a_0_5.avi", "videos/vid2.avi"],
    "tgif_action": ["videos/a.gif"],
    "tgif_transition": ["videos/a.mp4"],
    "tgif_frame": ["videos/a.gif", "videos/b.gif"],
    "didemo": ["videos/c@N00_1.mov.mp4", "videos/d@N00_2.avi"],
    "activitynet": ["videos/v_a.mp4", "videos/train_val/b.mp4"],
    "activitynet_qa": ["videos/v_a.mp4"],
    "ssv2_label": ["videos/1.webm", "videos/2.webm"],
    "ssv2_template": ["videos/1.webm", "videos/2.webm"],
    "lsmdc": [f"videos/0001_American_Beauty/{CLIP}.avi"],
    "hvu": ["videos/abcdefghijk_000015_000115.mp4"],
    "webvid_2m": ["videos/000001_000050/7.mp4"],
    "webvid_10m": ["videos/000001_000050/7.mp4"],
    "cc3m": [f"images/{CRC}.jpg"],
    "cc12m": [f"images/training/{CRC}.jpg"],
    "sbu": ["images/43_b0.jpg"],
    "coco": [f"images/val2014/COCO_val2014_{number:012d}.jpg" for number in range(4)],
    "visual_genome": ["images/VG_100K_2/1.jpg"],
}


@functools.cache
def small_media() -> dict[str, bytes]:
    """Tiny real media by file ending."""
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "lime", "blue")]
    gif, png, jpg = io.BytesIO(), io.BytesIO(), io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(png, "PNG")
    frames[0].save(jpg, "JPEG")
    clip = write_clip(range(0, 300, 100))
    media = {".gif": gif.getvalue(), ".png": png.getvalue(), ".jpg": jpg.getvalue()}
    return media | dict.fromkeys((".mp4", ".avi", ".webm", ".mov"), clip)


def small_file(name: str) -> bytes:
    """Tiny real media for a name; without a known ending, an image in `images/` or else a clip."""
    media = small_media()
    default = ".jpg" if name.startswith("images/") else ".mp4"
    return media.get(pathlib.Path(name).suffix, media[default])


def fill(folder: pathlib.Path, files: Mapping[str, object], media: Sequence[str] = ()) -> None:
    """Writes annotation files, as text or JSON, and media files into a folder."""
    contents = {name: _as_text(content).encode() for name, content in files.items()}
    contents |= {name: small_file(name) for name in media}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _as_text(content: object) -> str:
    return content if isinstance(content, str) else json.dumps(content)
