"""Uploads to the hub (--push_to_hub): the verified result, and complete checkpoints if --hub_strategy asks for them.

The Trainer's own uploads are not used: they replace the model card by a generic one, and add a pickle of all flags with
the paths of this machine, and the lock of the run.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from finetune.utils.errors import ArgumentError, NotSavedError
from finetune.utils.hub_errors import hub_errors

logger = logging.getLogger(__name__)

# Of a result or checkpoint: what does not belong to the model, and what shows data or machine of the user.
_KEPT_BACK = (
    *(".finetune/*", "checkpoint-*", "hang/*", "runs/*", ".former-*", "report.html", "bad_samples.jsonl", "_*"),
    *("training_args.bin", "stream.json", "manifest.json"),
)
_STATE = ("*.pt", "*.pth", "global_step*", "latest", "zero_to_fp32.py", "trainer_state.json")


@dataclass
class HubUpload:
    """Uploads of one run; on rank 0 alone.

    Attributes:
        repo: OWNER/NAME.
        strategy: end, every_save, checkpoint or all_checkpoints, as in transformers.
        token: None for that of ``hf auth login`` or HF_TOKEN.
        private: whether the repository is made private; None for the account's default.
        revision: branch; None for main.
        always: upload a checkpoint also while the former one is being uploaded.
    """

    repo: str
    strategy: HubStrategy
    token: str | None = None
    private: bool | None = None
    revision: str | None = None
    always: bool = False
    _running: list[Future[Any]] = field(default_factory=list)

    @classmethod
    def take_over(cls, training: TrainingArguments) -> HubUpload | None:
        """The uploads that the flags ask for, None for none; those of the Trainer are switched off."""
        if not training.push_to_hub or training.hub_model_id is None:
            return None
        training.push_to_hub = False
        return cls(
            training.hub_model_id,
            HubStrategy(training.hub_strategy),
            training.hub_token,
            training.hub_private_repo,
            training.hub_revision,
            training.hub_always_push,
        )

    def create(self) -> None:
        """Creates the repository, before anything is trained.

        Raises:
            ArgumentError: the account may not, or the hub cannot be reached.
        """
        api = HfApi(token=self.token)
        try:
            self.repo = api.create_repo(self.repo, private=self.private, exist_ok=True).repo_id
            if self.revision is not None:
                api.create_branch(self.repo, branch=self.revision, exist_ok=True)
        except hub_errors() as error:
            raise ArgumentError(
                f"--push_to_hub true: {self.repo} cannot be created or written: {_cause(error)}; look at "
                "--hub_model_id and the account (hf auth whoami), or train without --push_to_hub"
            ) from error

    def checkpoint(self, folder: Path) -> None:
        """Starts the upload of a complete checkpoint, if the strategy asks for it and the last one is done."""
        self._running = [upload for upload in self._running if not upload.done()]
        if self.strategy == HubStrategy.END or (self._running and not self.always):
            return
        whole = self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS)
        where = folder.name if self.strategy == HubStrategy.ALL_CHECKPOINTS else "last-checkpoint" if whole else None
        upload = HfApi(token=self.token).upload_folder(
            repo_id=self.repo,
            folder_path=folder,
            path_in_repo=where,
            commit_message=folder.name,
            revision=self.revision,
            ignore_patterns=["training_args.bin"] if whole else [*_KEPT_BACK, *_STATE],
            run_as_future=True,
        )
        upload.add_done_callback(_report)
        self._running.append(upload)

    def result(self, folder: Path) -> str:
        """Uploads the result; returns its address.

        Raises:
            NotSavedError: it could not be uploaded; it is complete in its folder.
        """
        api = HfApi(token=self.token)
        try:
            for upload in self._running:
                upload.exception()  # waits; what failed is logged
            done = api.upload_folder(
                repo_id=self.repo,
                folder_path=folder,
                commit_message="Result",
                revision=self.revision,
                ignore_patterns=[*_KEPT_BACK, *_STATE],
            )
        except hub_errors() as error:
            raise NotSavedError(
                f"the result is complete in {folder}, but could not be uploaded to {self.repo}: {_cause(error)}; "
                f"upload it with: hf upload {self.repo} {folder} --exclude {' '.join(map(repr, _KEPT_BACK))}"
            ) from error
        return str(done.commit_url)


def _report(upload: Future[Any]) -> None:
    if (error := upload.exception()) is not None:
        logger.warning("a checkpoint could not be uploaded, training continues: %s", _cause(error))


def _cause(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
