"""Facts about the Ministral 3 checkpoints that the parts of a toy checkpoint share."""

N_SPECIAL = 1000  # special ids come first, then the ranks of the byte pairs
IMG, IMG_BREAK, IMG_END = 10, 12, 13
MERGE = 2  # patches per side in one token
PATCH_PX = 14
GRID_PX = PATCH_PX * MERGE  # an image whose sides are multiples of this is never resized
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)  # RGB
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
# The Tekken v13 names; every id not listed is <SPECIAL_id>.
SPECIAL_NAMES = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    IMG: "[IMG]",
    11: "<pad>",
    IMG_BREAK: "[IMG_BREAK]",
    IMG_END: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
}
EMBEDDING_STD = 0.25  # small beside what a layer adds, or a tied model only repeats its last token
ROW_SPREAD = 0.5  # embedding rows differ in length (log-normal), as trained ones do: this clears the argmax
UNUSED_ROW = 0.1  # rows of special ids nobody trained are short, as in the releases: they never win
QK_GAIN = 1.5  # attention that prefers some positions, so that a few image tokens are not averaged away
GELU_RMS = 0.65  # rms of gelu(x) for x ~ N(0, 1): linear_2 undoes it to match the text embeddings
F8_MAX = 448.0
