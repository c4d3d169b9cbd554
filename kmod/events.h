/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_EVENTS_H
#define SNIFFER_EVENTS_H

#include <linux/stddef.h>
#include <linux/types.h>

#include "shared_proto.h"

/* What a message about a process has at least. */
#define SNIFFER_PROCESS_NO_START	offsetof(struct sniffer_process, start)

struct sniffer_process *sniffer_events_begin(void);
void sniffer_events_end(struct sniffer_process *process, bool with_start);
u64 sniffer_events_lost(void);
void sniffer_events_exit(void);

#endif /* SNIFFER_EVENTS_H */
