"""A teacher from transcripts: a small Whisper encoder learns to spell recordings (CTC), in minutes on a CPU.

    python examples/train_teacher.py recordings/fsdd teacher
    agrepa train demo data.train=recordings/fsdd data.max_seconds=1 'alignment.teachers={speech: {source: teacher}}'

The folder holds the encoder and its preprocessing, and is read as any published one. It hears one second at a time.
"""

import argparse
import string

import soundfile
import torch
import torchaudio
import transformers

import agrepa_fast as ag

RATE, SECONDS = 16_000, 1
LETTERS = "\0 '" + string.ascii_lowercase  # "\0" is CTC's blank


def recordings(folder):
    """[n, RATE] waveforms, and the letters of each text, of those clips that one window holds."""
    waves, texts = [], []
    for clip in ag.data.read_manifest(folder):
        text = [LETTERS.index(letter) for letter in clip.text.lower() if letter in LETTERS]
        wave, rate = soundfile.read(clip.path, dtype="float32", always_2d=True)
        wave = torchaudio.functional.resample(torch.from_numpy(wave).mean(1), rate, RATE)
        if text and len(wave) <= SECONDS * RATE:
            waves.append(torch.nn.functional.pad(wave, (0, SECONDS * RATE - len(wave))))
            texts.append(torch.tensor(text))
    if not waves:
        raise SystemExit(f"{folder}: no recording of at most {SECONDS} s with a text")
    return torch.stack(waves), texts


def spelled(logits):
    """The letters that each row of [B, T, letters] spells: repeats are one letter, blanks none."""
    rows = (torch.unique_consecutive(row) for row in logits.argmax(-1))
    return ["".join(LETTERS[i] for i in row if i) for row in rows]


def main(folder, out, epochs=25, width=128, layers=4):
    torch.manual_seed(0)
    waves, texts = recordings(folder)
    front = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=SECONDS)
    mels = torch.cat(
        [
            torch.from_numpy(front(list(part.numpy()), sampling_rate=RATE, return_tensors="np").input_features)
            for part in waves.split(256)
        ]
    )
    encoder = {"encoder_layers": layers, "encoder_attention_heads": 4, "encoder_ffn_dim": 2 * width, "dropout": 0.1}
    # The folder has a decoder because Whisper's has one; it is not trained, and teachers do not read it.
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 4, "vocab_size": 8}
    decoder |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
    window = {"num_mel_bins": 80, "max_source_positions": 50 * SECONDS}
    model = transformers.WhisperModel(transformers.WhisperConfig(d_model=width, **window, **encoder, **decoder))
    head = torch.nn.Linear(width, len(LETTERS))
    order = torch.randperm(len(texts))
    held, train = order[: len(order) // 10], order[len(order) // 10 :]
    steps = epochs * -(-len(train) // 64)
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.encoder.train()
    for _ in range(epochs):
        for part in train[torch.randperm(len(train))].split(64):
            logits = head(model.encoder(mels[part]).last_hidden_state)
            chosen = [texts[i] for i in part]
            loss = torch.nn.functional.ctc_loss(
                logits.log_softmax(-1).transpose(0, 1),
                torch.cat(chosen),
                torch.full((len(part),), logits.shape[1]),
                torch.tensor([len(text) for text in chosen]),
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.encoder.eval()
    with torch.no_grad():
        guesses = spelled(head(model.encoder(mels[held]).last_hidden_state))
    right = sum(guess == "".join(LETTERS[i] for i in texts[clip]) for guess, clip in zip(guesses, held))
    model.save_pretrained(out)
    front.save_pretrained(out)
    print(f"{out}: loss {loss.item():.3f}; {right} of {len(held)} recordings that it had not heard are spelled right")
    return right / len(held)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="recordings with a list of their texts")
    parser.add_argument("out", help="folder for the encoder")
    main(**vars(parser.parse_args()))
