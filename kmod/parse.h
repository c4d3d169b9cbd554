/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_PARSE_H
#define SNIFFER_PARSE_H

#include "lookup.h"

bool sniffer_parse(struct sniffer_flow *flow);

#endif /* SNIFFER_PARSE_H */
