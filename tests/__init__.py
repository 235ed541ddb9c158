# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0
