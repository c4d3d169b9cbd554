// SPDX-License-Identifier: GPL-2.0-only
/*
 * sniffer - names each TCP and UDP packet's socket and process.
 *
 * The way of a packet: hooks.c (entry) -> parse.c (headers) -> lookup.c (which socket)
 * -> name.c (which process, from table.c) -> batch.c (message) -> stream.c ->
 * netlink.c. A packet like an earlier one takes that one's record (memo.c).
 *
 * The owner table learns from probes.c and tracepoints.c, through use.c. When a socket's user
 * closes it, holders.c looks for another. owner.c has the rules. process.c keeps the
 * processes, commands.c answers questions.
 *
 * Each file includes only what lies below it.
 *
 * This file starts the parts in order, and stops them in reverse.
 */
#include <linux/module.h>

#include "batch.h"
#include "collect.h"
#include "commands.h"
#include "hooks.h"
#include "listen.h"
#include "memo.h"
#include "owner.h"
#include "probes.h"
#include "process.h"

static int __init sniffer_init(void)
{
	int err;

	err = sniffer_process_init();
	if (err)
		return err;

	err = sniffer_owner_init();
	if (err)
		goto exit_process;

	sniffer_collect_init();
	err = sniffer_batch_init();
	if (err)
		goto exit_owner;

	err = sniffer_commands_init();
	if (err)
		goto exit_batch;

	/* Before the hooks, so that the first packet finds its owner. */
	err = sniffer_probes_init();
	if (err)
		goto exit_commands;

	err = sniffer_memo_init();
	if (err)
		goto exit_probes;
	err = sniffer_hooks_init();
	if (err)
		goto exit_memo;
	sniffer_listen_init();

	pr_info("sniffer: loaded, version " SNIFFER_RELEASE "\n");
	return 0;

exit_memo:
	sniffer_memo_exit();
exit_probes:
	sniffer_probes_exit();
exit_commands:
	sniffer_batch_stop();
	sniffer_commands_exit();
exit_batch:
	sniffer_batch_exit();
exit_owner:
	sniffer_collect_exit();
	sniffer_owner_exit();
exit_process:
	sniffer_process_exit();
	return err;
}

static void __exit sniffer_exit(void)
{
	sniffer_listen_exit();
	sniffer_hooks_exit();
	sniffer_memo_exit();
	sniffer_probes_exit();
	sniffer_batch_stop();
	sniffer_commands_exit();
	sniffer_batch_exit();
	sniffer_collect_exit();
	sniffer_owner_exit();
	sniffer_process_exit();
}

module_init(sniffer_init);
module_exit(sniffer_exit);

MODULE_DESCRIPTION("Names each TCP and UDP packet's socket and process");
MODULE_LICENSE("GPL");
MODULE_VERSION(SNIFFER_RELEASE);
