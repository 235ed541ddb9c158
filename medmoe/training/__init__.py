# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Loss, optimizer, checkpoints, tracking and pictures, as handlers around MONAI's SupervisedTrainer and Evaluator."""
