/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_EVENTS_H
#define SNIFFER_EVENTS_H

#include <linux/types.h>

#include "shared_proto.h"

struct sniffer_process *sniffer_events_begin(void);
void sniffer_events_end(struct sniffer_process *process);
u64 sniffer_events_lost(void);
void sniffer_events_exit(void);

#endif /* SNIFFER_EVENTS_H */
