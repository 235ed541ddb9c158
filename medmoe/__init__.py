# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

"""Frozen general-domain and medical-domain vision encoders, adapted together by what routes between them."""

__version__ = "0.1.0"
